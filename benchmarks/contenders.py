"""Builds a distillation step of this engine and of others, with equal models, batch and optimiser.

Every contender is a function of a batch that runs a whole step (teacher, student, backward pass,
clipping, AdamW) and returns the loss. In bfloat16, all contenders compute with bfloat16 parameters,
communicate bfloat16 gradients and update float32 master weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import job_of, zero_engine
from harness import ROOT
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.forward_backward import forward_backward, prepared
from fd_large.engine.zero import config as ds
from fd_large.engine.zero.optimizer import make_optimizer, parameter_groups, set_learning_rate
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.distillation.job import DistillationJob

RATE = 1e-4
Step = Callable[[Batch], Tensor]


class Unavailable(Exception):
    """Raised on all ranks, with the reason, if a contender cannot run on this machine."""


@dataclass(frozen=True)
class Setting:
    """Models, batch and precision that all contenders share.

    Attributes:
        run: The recipe.
        bfloat16: Whether student and teacher compute in bfloat16.
        job: The recipe's job with its teacher, which is whole on every rank; all contenders use it.
        peer_repo: A checkout of Feature-Distillation, or None.
    """

    run: Run
    bfloat16: bool
    job: DistillationJob
    peer_repo: Path | None

    @property
    def make_task(self) -> Callable[[], Any]:
        """Function that builds the student with its loss."""
        return lambda: self.job.task_around(self.job.teachers)


def share(
    model: str,
    width: int,
    image_size: int,
    micro_batch: int,
    precision: str,
    peer_repo: Path | None,
) -> Setting:
    """Returns a setting with a SwinV2 student, and a Swin teacher of the same widths.

    The side of a window in tokens is image_size / 16, as 14 at 224 px and 12 at 192 px.

    Args:
        model: Name of the student's model.
        width: Channels of the first stage; 0 for the model's own.
        image_size: Side of the images in pixels.
        micro_batch: Images per rank.
        precision: Value of engine.precision.
        peer_repo: A checkout of Feature-Distillation, or None.
    """
    run = registry.get("fd_esvit_swin_base")
    world = distributed.world_size()
    window = Architecture(window_size=image_size // 16)
    if width:
        heads = tuple(width // 32 * 2**stage for stage in range(4))
        window = replace(window, embed_dim=width, num_heads=heads)
    run = replace(run, student=replace(run.student, model=model, architecture=window))
    shape = run.student_architecture()
    widths = replace(
        window,
        embed_dim=shape.embed_dim,
        depths=shape.depths,
        num_heads=shape.num_heads,
        image_size=image_size,
    )
    run = replace(
        run,
        teacher=replace(run.teacher, architecture=widths, source="random", placement="replicated"),
        data=replace(run.data, image_size=image_size),
        batch=replace(
            run.batch, global_batch_size=micro_batch * world, micro_batch_size=micro_batch
        ),
        engine=replace(run.engine, precision=precision),
    )
    # Its warning about random weights would be noise here.
    logging.getLogger("fd_large.tasks.distillation.built_teacher").setLevel(logging.ERROR)
    return Setting(run, ds.computes_in_bfloat16(precision), job_of(run), peer_repo)


def build(name: str, setting: Setting) -> Step:
    """Returns the step of a contender; all ranks build contenders in the same order.

    Args:
        name: The contender, such as "zero1" or "ddp" (a key of `harness.TITLES`).
        setting: Models, batch and precision.

    Raises: Unavailable: if the contender cannot run on this machine.
    """
    if name in ("hpz", "zero0", "zero1", "zero2", "zero3"):
        return _engine(name, setting)
    if name == "peer":
        from peer import build_peer

        if setting.peer_repo is None:
            raise Unavailable("no --peer-repo")
        return build_peer(setting)
    return {"alone": _alone, "ddp": _ddp, "fsdp2": _fsdp2, "fairscale": _fairscale}[name](setting)


def _engine(name: str, setting: Setting) -> Step:
    run = setting.run
    if name == "zero0" and setting.bfloat16:
        raise Unavailable("the engine trains in float32 only at stage 0")
    config: dict[str, Any] | str = {} if name == "zero0" else name
    if name == "hpz":
        config = ds.load(ROOT / "ds_configs/zero3_hpz.json")
        if distributed.local_world_size() == distributed.world_size():
            # A run on one node turns hpZ off; here its cost is the question.
            config["zero_optimization"]["zero_hpz_partition_size"] = distributed.world_size()
    engine = zero_engine(
        run, setting.make_task, config, micro_batch_size=run.batch.micro_batch_size
    )

    def step(batch: Batch) -> Tensor:
        set_learning_rate(engine.deepspeed.optimizer, RATE)
        loss = forward_backward(engine, batch, 0)
        engine.deepspeed.step()
        return loss

    return step


def _seeded_task(setting: Setting) -> Any:
    """Returns the student with its loss as a module in training mode, on this rank's device.

    Its initial weights are drawn with the recipe's seed, as those of this package's engine are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.run.runtime.seed)
        task = setting.make_task()
    mode = setting.run.student.activation_checkpointing
    checkpoint_blocks(task.student.blocks(), mode=mode)
    return task.to(distributed.device()).train()


def _optimizer(groups: list[dict[str, Any]], setting: Setting) -> torch.optim.Optimizer:
    on_gpu = distributed.device().type == "cuda"
    optimizer = make_optimizer(groups, setting.run.optim, on_gpu=on_gpu)
    set_learning_rate(optimizer, RATE)
    return optimizer


def _update(
    setting: Setting,
    module: Any,
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Any],
    batch: Batch,
) -> Tensor:
    """Runs a whole step in plain torch; returns the loss before the step, detached.

    Args:
        setting: Not used.
        module: The student with its loss, perhaps wrapped by DDP.
        optimizer: The optimiser of the module.
        clip: Function that clips the gradients after the backward pass.
        batch: The batch of this rank.
    """
    task = getattr(module, "module", module)
    loss, _ = module(**prepared(task, batch, 0))
    loss.backward()
    clip()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _clip(parameters: list[Tensor], norm: float) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, norm)


def _whole(setting: Setting, wrap: Callable[[Any], Any]) -> Step:
    """Returns a step of plain torch with all weights on every rank.

    In bfloat16, the optimiser updates float32 copies of the weights.

    Args:
        setting: Models, batch and precision.
        wrap: Function that wraps the module, as DDP does.
    """
    task = _seeded_task(setting)
    groups = parameter_groups(task, setting.run.optim.weight_decay)
    norm = setting.run.optim.clip_norm
    if not setting.bfloat16:
        module = wrap(task)
        optimizer = _optimizer(groups, setting)
        return partial(
            _update, setting, module, optimizer, partial(_clip, [*task.parameters()], norm)
        )

    parameters = [p for group in groups for p in group["params"]]
    masters = [p.detach().clone() for p in parameters]
    position = iter(masters)
    groups = [{**g, "params": [next(position) for _ in g["params"]]} for g in groups]
    optimizer = _optimizer(groups, setting)
    for parameter in task.parameters():
        parameter.data = parameter.data.bfloat16()
    module = wrap(task)

    def step(batch: Batch) -> Tensor:
        loss, _ = module(**prepared(task, batch, 0))
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        _clip(masters, norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return loss.detach()

    return step


def _alone(setting: Setting) -> Step:
    return _whole(setting, lambda task: task)


def _ddp(setting: Setting) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [distributed.local_rank()] if distributed.device().type == "cuda" else None
    # Gradients as views of the buckets: DDP's own fastest and smallest way.
    wrap = partial(DistributedDataParallel, device_ids=device_ids, gradient_as_bucket_view=True)
    return _whole(setting, wrap)


def _fsdp2(setting: Setting) -> Step:
    task = _seeded_task(setting)
    shard(task, task.student, bfloat16=setting.bfloat16)
    optimizer = _optimizer(parameter_groups(task, setting.run.optim.weight_decay), setting)
    clip = partial(_clip, [*task.parameters()], setting.run.optim.clip_norm)
    return partial(_update, setting, task, optimizer, clip)


def shard(module: Any, backbone: Any, *, bfloat16: bool) -> None:
    """Shards a module over the ranks by torch's FSDP2; each block of its backbone is a unit.

    Args:
        module: The module, which is changed in place.
        backbone: The backbone in the module.
        bfloat16: Whether to compute and communicate in bfloat16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(distributed.device().type, (distributed.world_size(),))
    types = {}
    if bfloat16:
        # The models cast by themselves, and keep what is float32 on purpose.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)
        types = {"mp_policy": policy}
    blocks = backbone.blocks()
    # Stages ask for the blocks' bias tables outside the blocks: these small models are one unit.
    tables = [block.attn.cpb_mlp for block in blocks if hasattr(block.attn, "cpb_mlp")]
    if tables:
        fully_shard(tables, mesh=mesh, **types)
    for block in blocks:
        fully_shard(block, mesh=mesh, **types)
    fully_shard(module, mesh=mesh, **types)


def _fairscale(setting: Setting) -> Step:
    if distributed.device().type != "cuda":
        raise Unavailable("fairscale's FSDP takes CUDA streams in every forward")
    try:
        from fairscale.nn import FullyShardedDataParallel
    except ImportError:
        raise Unavailable("fairscale is not installed") from None
    task = _seeded_task(setting)
    wrap = partial(
        FullyShardedDataParallel, mixed_precision=setting.bfloat16,
        compute_dtype=torch.bfloat16 if setting.bfloat16 else torch.float32,
    )  # fmt: skip
    # Stages, since a block's bias table is computed outside the block.
    for position, stage in enumerate(task.student.layers):
        task.student.layers[position] = wrap(stage)
    module = wrap(task)
    # Flattened parameters have lost their names: one group, all of it decays.
    groups = [{"params": [*module.parameters()], "weight_decay": setting.run.optim.weight_decay}]
    clip = partial(module.clip_grad_norm_, setting.run.optim.clip_norm)
    return partial(_update, setting, module, _optimizer(groups, setting), clip)
