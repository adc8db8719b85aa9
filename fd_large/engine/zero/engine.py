"""Builds a task inside its DeepSpeed engine, with exact float32 masters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from fd_large.engine import block_wrappers, memory
from fd_large.engine.task import Task
from fd_large.engine.zero import compiled_ops, partition
from fd_large.engine.zero import config as ds
from fd_large.engine.zero.disk import Disk
from fd_large.engine.zero.gradient_reduction import spare_passes
from fd_large.engine.zero.optimizer import make_optimizer, parameter_groups
from fd_large.engine.zero.private_names import check_optimizer
from fd_large.engine.zero.start import deepspeed
from fd_large.engine.zero.step_gate import StepGate
from fd_large.engine.zero.stream_order import order_gathers, record_gradients
from fd_large.engine.zero.whole_blocks import gather_whole
from fd_large.errors import ConfigError
from fd_large.plan.buckets import gradient_bucket
from fd_large.plan.memory import DEFAULT_BUCKET_SIZE
from fd_large.ranks import distributed
from fd_large.recipes.sections import Optim

log = logging.getLogger(__name__)

InitialWeights = Mapping[str, Iterable[tuple[str, Tensor]]]
"""Pairs (name, unsharded tensor) for modules of a task, by the module's name; "" is the task.

Every rank has these pairs."""


class Engine(NamedTuple):
    """A task inside its DeepSpeed engine.

    Attributes:
        deepspeed: The DeepSpeed engine; its module is the task.
        task: The trained Module.
        stage: The ZeRO stage, 0 to 3.
        config: DeepSpeed's filled JSON.
        gate: Lets the ranks decide whether the optimiser makes a step.
        averages: Moving averages of the running statistics of batch norms, by name; empty if the
            recipe has no average of the weights (`ema.py`).
        disk: Holds the optimiser's float32 state; None if the state is in memory.
        gradients: Tensors that hold gradients, and stay in memory from step to step.
        infinite_buffers: Names of the task's floating-point buffers that are not finite from the
            start, such as a mask in the user's own model.
    """

    deepspeed: Any
    task: Task
    stage: int
    config: dict[str, Any]
    gate: StepGate
    averages: dict[str, Tensor]
    disk: Disk | None = None
    gradients: Sequence[Tensor] = ()
    infinite_buffers: frozenset[str] = frozenset()


def build_engine(
    make: Callable[[], Task],
    config: dict[str, Any],
    *,
    optim: Optim,
    seed: int,
    compile_blocks: bool = False,
    activation_checkpointing: str = "off",
    checkpoint_every: int = 1,
    whole_first: bool = False,
    initial: InitialWeights | None = None,
) -> Engine:
    """Builds a task in its DeepSpeed engine.

    Args:
        make: Constructs the task; draws from torch's global generator only.
        config: A filled DeepSpeed JSON. State that belongs on a disk is made there from the start.
        optim: The recipe's section of the optimiser.
        seed: Seed of the random weights.
        compile_blocks: Whether torch.compile compiles each of the student's blocks.
        activation_checkpointing: "off", "every" or "offload" (see `block_wrappers.py`).
        checkpoint_every: k, to checkpoint each k-th block.
        whole_first: See `partition.build`.
        initial: Weights of the modules that do not start at random.

    Raises: ConfigError: if DeepSpeed's quantiser is asked for and cannot be used.
    """
    stage, zero = ds.stage_of(config), config["zero_optimization"]
    _check_quantiser(zero)
    folder, deepspeed_json = ds.nvme_path(config), ds.for_deepspeed(config)
    disk = Disk(folder) if folder else None
    task = partition.build(
        make, deepspeed_json, partitioned=stage == 3, seed=seed, whole_first=whole_first, disk=disk
    )
    for name, tensors in (initial or {}).items():
        where = "--student.init" if name in ("", "student") else name
        partition.load_weights(task.get_submodule(name), tensors, where=where)
    exact = partition.to_bfloat16(task, keep_exact=True) if config["bf16"]["enabled"] else {}
    if stage < 3:
        task.to(distributed.device())
    if compile_blocks:
        block_wrappers.compile_blocks(task.student.blocks())
    _checkpoint_blocks(task.student.blocks(), mode=activation_checkpointing, every=checkpoint_every)
    on_gpu = distributed.device().type == "cuda" and not ds.offloads(config, "offload_optimizer")
    optimizer = make_optimizer(parameter_groups(task, optim.weight_decay), optim, on_gpu=on_gpu)
    on_disk = ds.offloads_to_disk(config, "offload_param")
    with _holding_state(disk, task, exact, weights=on_disk):
        engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=deepspeed_json)
    check_optimizer(engine.optimizer, optimizer, ds.optimizer_class(config))
    if exact:
        partition.set_masters(task, exact)
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE)
    if stage == 0:
        bucket = gradient_bucket(sum(parameter.numel() for parameter in task.parameters()))
    gradients = spare_passes(engine, bucket=bucket)
    if stage == 3:
        gather_whole(engine, task.student, zero)
        order_gathers(engine)
        record_gradients(engine)
    buffers = partition.running_statistics(task).items()
    infinite = frozenset(name for name, buffer in buffers if not buffer.isfinite().all())
    memory.give_back()
    return Engine(engine, task, stage, config, StepGate(optimizer), {}, disk, gradients, infinite)


def _check_quantiser(zero: Mapping[str, Any]) -> None:
    """Raises ConfigError if the JSON asks for DeepSpeed's compiled quantiser and it cannot be used.

    All ranks must call this function. `zero` is the section `zero_optimization` of the JSON.
    """
    if (zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients")) and (
        reason := compiled_ops.load("Quantizer")
    ):
        raise ConfigError(
            f"zero_optimization: DeepSpeed's quantiser cannot be used; got {reason}, expected a "
            "working quantiser. Remove zero_quantized_* from the JSON, or see docs/clusters.md."
        )


def _holding_state(
    disk: Disk | None, task: Task, exact: dict[str, Tensor], *, weights: bool
) -> AbstractContextManager[Any]:
    """Returns a context in which DeepSpeed makes the optimiser's state on a disk, if there is one.

    Args:
        task: The task, sharded by ZeRO-3.
        exact: Values of the float32 masters by parameter name, which are removed from the dict. If
            it is empty, the masters are copied from the parameters.
        weights: Whether weights that are offloaded to host memory go to the disk too.
    """
    if disk is None:
        return nullcontext()
    named = task.named_parameters() if exact else ()
    return disk.holds_state({p.ds_id: exact.pop(name) for name, p in named}, weights=weights)


def _checkpoint_blocks(blocks: Sequence[nn.Module], *, mode: str, every: int) -> None:
    wrapped = block_wrappers.checkpoint_blocks(blocks, mode=mode, every=every)
    if wrapped:
        log.debug("activation checkpointing: %d of %d blocks", wrapped, len(blocks))
    elif mode != "off":
        why = "the student has fewer blocks than student.checkpoint_every" if blocks else ""
        log.warning(
            "student.activation_checkpointing: no activations are recomputed, because %s",
            why or "recomputation is not known to be correct for any block of the student",
        )
