"""Runs one step of a job's task on one device, or on shapes alone, for counting and timing.

The task runs as it does in training, but without an engine: first the frozen models and other work
without gradients, then the sums of a step in two passes, forward and backward. `run_step` tells its
caller which of these phases begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.job import TrainingJob
from fd_large.engine.student import group_norms
from fd_large.engine.task import Task
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.errors import ConfigError, FDError
from fd_large.kernels import choose
from fd_large.plan.phases import BACKWARD, FIRST_PASS, FORWARD

aten = torch.ops.aten


class Models(NamedTuple):
    """The task of a step, and the models that it uses and does not train, by section."""

    task: Task
    frozen: Mapping[str, nn.Module]

    def all(self) -> tuple[nn.Module, ...]:
        """Returns the task and the frozen models."""
        return self.task, *self.frozen.values()

    def checkpoint(self, every: int) -> None:
        """Turns on activation checkpointing for each `every`-th block of the student."""
        checkpoint_blocks(self.task.student.blocks(), mode="every", every=every)


def models_of(job: TrainingJob, *, bfloat16: bool, frozen_bfloat16: bool) -> Models:
    """Constructs a job's models on torch's current default device, with random weights.

    No weights or images are read. `bfloat16` and `frozen_bfloat16` tell whether the task and the
    frozen models compute in bfloat16.
    """
    task, frozen = job.models_on_shapes()
    group_norms(task, job.run.norm_batch())
    for model in (*([task] if bfloat16 else []), *(frozen if frozen_bfloat16 else [])):
        to_bfloat16(model)
    names = list(job.run.frozen_models)
    if len(names) != len(frozen):  # Some are stored maps, or they have no section.
        names = [f"frozen model {i}" for i in range(1, len(frozen) + 1)]
    return Models(task, dict(zip(names, frozen, strict=True)))


def run_step(models: Models, batch: Batch, to: Callable[[str], object]) -> None:
    """Runs forward and backward of a micro batch on the models' device.

    `to` is called with the name of each phase that begins: FORWARD, BACKWARD, FIRST_PASS for the
    sums of a step in two passes, the name of a frozen model, and "" at the end. When an interrupted
    phase goes on, its name is passed again.
    """
    handles, running = [], [FORWARD]
    sums = models.task.sums

    def begin(phase: str) -> None:
        running.append(phase)
        to(phase)

    def end(*_: Any) -> None:
        running.pop()
        to(running[-1])

    def first_pass(*arguments: Any) -> Tensor:
        begin(FIRST_PASS)
        try:
            return sums(*arguments)
        finally:
            end()

    models.task.sums = first_pass  # type: ignore[method-assign]
    for name, model in models.frozen.items():
        # The first hook, so that what other hooks record counts in the model's phase.
        handles.append(
            model.register_forward_pre_hook(lambda *_, name=name: begin(name), prepend=True)
        )
        handles.append(model.register_forward_hook(end))
    try:
        to(FORWARD)
        loss = models.task.shapes_only(batch)
        to(BACKWARD)
        loss.backward()
        to("")
    finally:
        del models.task.sums
        for handle in handles:
            handle.remove()


@contextmanager
def on_shapes(device: choose.Device) -> Iterator[None]:
    """Lets the block build and run models on the meta device with the kernels of `device`.

    Raises: ConfigError: if a model cannot run on the meta device.
    """
    ours = functools.partial(_attention, device.on_gpu)
    torchs, nn.functional.scaled_dot_product_attention = (
        nn.functional.scaled_dot_product_attention,
        ours,
    )
    try:
        # Initialising weights without values would still advance the generator.
        with choose.standing_in(device), torch.random.fork_rng(devices=[]), torch.device("meta"):
            yield
    except FDError:
        raise
    except Exception as error:  # Code of the user's own may raise anything.
        raise ConfigError(
            f"count: a step cannot run on shapes alone; got {type(error).__name__}: {error}, "
            "expected models and a loss that torch's meta device can run. Plan with a similar "
            "model instead."
        ) from error
    finally:
        nn.functional.scaled_dot_product_attention = torchs


def _attention(
    on_gpu: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Replaces `scaled_dot_product_attention` on the meta device, where torch would split it up.

    Calls the single operation that an imitated GPU (if `on_gpu` is True) or CPU would run. The
    other parameters are those of `scaled_dot_product_attention`.
    """
    if q.ndim == 3:  # The heads are in the batch, as in SAM.
        q, k, v = (part[:, None] for part in (q, k, v))
        mask = None if attn_mask is None else attn_mask[:, None]
        return _attention(on_gpu, q, k, v, mask, dropout_p, is_causal, scale)[:, 0]
    if not on_gpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]
    mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    log_sum = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, mask))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, log_sum, dropout_p, is_causal, scale=scale
    )[0]
