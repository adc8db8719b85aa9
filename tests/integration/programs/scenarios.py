"""Rank program: trains tiny runs under DeepSpeed in many settings and writes what came out.

scenarios.py FOLDER, with scenarios.json in it: {name: {"run": overrides by section, "zero":
zero_optimization of the JSON, "updates": 5, "few_ranks": 8}}; more than `few_ranks` are treated as
many are. `plain_losses` is the same run in plain torch: one process, whole batches, torch's AdamW.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from launch import write_result
from plain_steps import plain_adamw, plain_step
from tensor_storages import storages

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import arguments_of_step, backward
from fd_large.engine.opening import engine_of
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.student import group_norms
from fd_large.engine.task import Task
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import gloo, gradient_buckets, partition, start
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.optimizer import parameter_groups, set_learning_rate
from fd_large.plan import memory
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Teacher

UPDATES = 5
# Bucket sizes of a test: DeepSpeed's default bucket alone would be 2 GB.
ZERO1 = {"stage": 1, "reduce_bucket_size": 1_000_000}
ZERO2 = {"stage": 2, "reduce_bucket_size": 1_000_000}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}


def tiny_run(**sections: dict[str, Any]) -> Run:
    """The G recipe's shrunken twin: same code path, extra norms and drop path, small nets."""
    run = registry.get("fd_swinv2g")
    shape = Architecture(
        embed_dim=32,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        extra_norm_every=2,
    )
    small = Architecture(
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        extra_norm_every=0,
    )
    run = replace(
        run,
        student=replace(
            run.student, architecture=shape, drop_path_rate=0.3, activation_checkpointing="off"
        ),
        teacher=replace(
            run.teacher, architecture=small, source="random", placement="sharded", dtype="auto"
        ),
        data=replace(run.data, image_size=32),
        optim=replace(
            run.optim, base_lr=1e-1, warmup_lr=1e-2, min_lr=1e-3, warmup_epochs=0.0, clip_norm=0.05
        ),
        batch=replace(run.batch, global_batch_size=12, micro_batch_size=3),
        engine=replace(run.engine, precision="float32"),
    )
    # Each of several teachers is the run's own, but for what is said of it.
    if several := sections.pop("teachers", {}):
        entry = NamedTeacher.joined(run.teacher, run.objective)
        teachers = {name: entry for name in several}
        run = replace(run, teacher=Teacher(), objective=Objective(), teachers=teachers)
        flat = {f"{name}.{field}": v for name, of in several.items() for field, v in of.items()}
        run = run.with_fields({f"teachers.{name}": value for name, value in flat.items()})
    for section, values in sections.items():
        if "architecture" in values:
            fields = values["architecture"].items()
            # JSON has no tuples.
            shape = {k: tuple(v) if isinstance(v, list) else v for k, v in fields}
            values = values | {"architecture": Architecture(**shape)}
        run = replace(run, **{section: replace(getattr(run, section), **values)})
    return run


def images_of(update: int, run: Run) -> torch.Tensor:
    """The global batch of a step: uint8 noise with some structure, (G, 3, S, S)."""
    size = run.data.image_size
    generator = torch.Generator().manual_seed(1000 + update)
    shape = (run.batch.global_batch_size, 3, size // 8, size // 8)
    coarse = torch.randint(0, 200, shape, generator=generator, dtype=torch.uint8)
    fine = torch.randint(0, 56, (*shape[:2], size, size), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) + fine


def schedule_of(run: Run) -> CosineSchedule:
    """Learning rates of a short run with two steps of warm-up."""
    peak, start, minimum = run.optim.rates(run.batch.global_batch_size)
    return CosineSchedule(peak, start, minimum, UPDATES, 2)


def plain_task(run: Run) -> Task:
    """The run's task with its initial weights, in plain torch."""

    def seeded(make: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        return make()

    job = DistillationJob(run)
    teachers = {
        name: seeded(partial(job.make_teacher, name), run.runtime.seed + 1)
        for name in run.taught_by
    }
    task = seeded(lambda: job.task_around(teachers), run.runtime.seed)
    if run.student.init:
        initial = DistillationJob(run).initial_weights()
        partition.load_weights(task.student, initial["student"], where="--student.init")
    images = run.batch.global_batch_size
    group_norms(task, run.norm_batch(), global_batch=images, micro_batch=images)
    return task


def plain_losses(*arguments: Any, **named: Any) -> list[float]:
    """The losses of `plain_steps`."""
    return [loss for loss, _ in plain_steps(*arguments, **named)]


def plain_steps(
    run: Run,
    updates: int = UPDATES,
    *,
    batches: Iterable[Batch] | None = None,
    schedule: CosineSchedule | None = None,
) -> list[tuple[float, float]]:
    """One process, no engine: loss and gradient norm of each step, the reference of every scenario.

    Args:
        run: The run.
        updates: Steps.
        batches: Its global batches; None: those of `images_of`.
        schedule: Its learning rates; None: those of `schedule_of`.
    """
    task = plain_task(run)
    optimizer = plain_adamw(parameter_groups(task, run.optim.weight_decay), run.optim)
    schedule, steps = schedule or schedule_of(run), []
    for update, batch in zip(range(updates), batches or made_up_batches(run), strict=False):
        task.before_step(update / schedule.total)
        (arguments,) = arguments_of_step(task, task, [batch], run.runtime.seed, count=1)
        loss, _ = task(**arguments)
        norm = plain_step(loss, task, optimizer, schedule, update, clip_norm=run.optim.clip_norm)
        task.after_step()
        steps.append((loss.item(), norm))
    return steps


def made_up_batches(run: Run) -> Iterator[Batch]:
    """The global batches of `images_of`."""
    positions = torch.arange(run.batch.global_batch_size)
    for update in count():
        yield Batch(images_of(update, run), 0, positions + update * len(positions), positions)


@contextmanager
def watching_sums(few_ranks: int | None) -> Iterator[Counter[str]]:
    """Counts the elements that the ranks sum, by data type; with other limits for many ranks."""
    summed: Counter[str] = Counter()

    def counting(plain: Callable[..., Any], tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        summed[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        return plain(tensor, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        if few_ranks is not None:
            patch.setattr(memory, "MOST_BFLOAT16_SUMMANDS", few_ranks)
            for file in (memory, gradient_buckets):
                patch.setattr(file, "MOST_OWNERS", few_ranks)
        # Of two CPU ranks the owner itself adds: no reduction of torch's shows that.
        places = ((torch.distributed, "all_reduce"), (deepspeed.comm, "reduce"))
        for place, name in (*places, (gloo, "sum_on_owner")):
            patch.setattr(place, name, partial(counting, getattr(place, name)))
        yield summed


def start_engine(run: Run, zero: dict[str, Any]) -> tuple[Engine, DistillationJob]:
    """The run's engine, and its job with the teacher, on all ranks."""
    world = distributed.world_size()
    bfloat16 = ds.computes_in_bfloat16(run.engine.precision)
    node_size, job = ds.ranks_of_a_node(run.engine.node_size, world), DistillationJob(run)
    micro = run.batch.micro_batch_size
    numbers = ds.RunNumbers(
        micro_batch_size=micro,
        accumulation=run.batch.global_batch_size // world // micro,
        world_size=world,
        node_size=node_size,
        clip_norm=run.optim.clip_norm,
        bfloat16=bfloat16,
        parameter_sizes=sum(job.tensor_sizes(), ()),
    )
    config = ds.fill({"zero_optimization": zero}, numbers)
    job.build(bfloat16=bfloat16, node_size=node_size, persistence_threshold=0)
    return engine_of(run, job.make_task, config, initial=job.initial_weights()), job


def take_step(engine: Engine, run: Run, update: int) -> float:
    """Takes a step on this rank's share of the images; returns the loss over all ranks."""
    world, rank = distributed.world_size(), distributed.rank()
    micro, share = run.batch.micro_batch_size, run.batch.global_batch_size // world
    set_learning_rate(engine.deepspeed.optimizer, schedule_of(run).at_step(update))
    images, total = images_of(update, run), torch.zeros(())
    engine.task.before_step(update / UPDATES)
    batches = []
    for start_at in range(rank * share, (rank + 1) * share, micro):
        positions = torch.arange(start_at, start_at + micro)
        batches.append(Batch(images[positions], 0, positions + update * len(images), positions))
    for arguments in arguments_of_step(
        engine.task, engine.deepspeed, batches, run.runtime.seed, count=len(batches)
    ):
        total += backward(engine, arguments) * micro / share
        engine.deepspeed.step()
    engine.task.after_step()
    return (distributed.sum_tensor(total) / world).item()


def engine_result(run: Run, zero: dict[str, Any], updates: int = UPDATES) -> dict[str, Any]:
    """The same run in the engine on all ranks: losses, teacher hashes, bytes held."""
    before = storages()
    engine, job = start_engine(run, zero)
    teachers = job.teachers.values()
    engine.task.train()
    master_error = _master_error(engine, job.make_task, run)
    losses, norms = [], []
    for update in range(updates):
        losses.append(take_step(engine, run, update))
        norms.append(engine.deepspeed.get_global_grad_norm())
    result = {
        "losses": losses,
        "master_error": master_error,
        "norms": [None if n is None else float(n) for n in norms],
        "teacher_hash": [one for t in teachers for one in (t.fingerprint, t.hash_now())],
        "held_bytes": distributed.gather_objects(_new_bytes(before)),
        "planned_bytes": planned_bytes(run, engine.config),
        "teacher_bytes": distributed.gather_objects(sum(t.held_bytes() for t in teachers)),
    }
    engine.deepspeed.destroy()
    del engine, teachers, job
    start.forget_engines()
    gc.collect()
    return result


def _master_error(engine: Engine, make: Any, run: Run) -> float:
    """Largest distance of a float32 master from the exact initial value."""
    exact = dict(
        partition.build(make, {}, partitioned=False, seed=run.runtime.seed).named_parameters()
    )
    worst = 0.0
    for name, parameter in engine.task.named_parameters():
        if engine.stage == 0:
            master = parameter.detach()
        else:
            master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        worst = max(worst, (master - exact[name]).abs().max().item())
    return worst


def planned_bytes(run: Run, config: dict[str, Any]) -> int:
    """What the plan says that a rank holds between steps, device and host; on rank 0, else 0."""
    if not distributed.is_main():
        return 0
    place = memory.Placement.of(
        next(iter(run.taught_by.values())),
        config["zero_optimization"],
        world_size=distributed.world_size(),
        node_size=ds.ranks_of_a_node(run.engine.node_size, distributed.world_size()),
        bfloat16=config["bf16"]["enabled"],
        teacher_persistence_threshold=0,
        float32_sums=config["communication_data_type"] == "fp32",
    )
    held = memory.held(*_sizes(run), place)
    return held.device.total + held.host.total


def _sizes(run: Run) -> tuple[Sequence[int], Sequence[int]]:
    """Sizes of the student's and of the teachers' parameters."""
    with torch.device("meta"):
        task, frozen = DistillationJob(run).models_on_shapes()
    trained = [p.numel() for p in task.parameters() if p.requires_grad]
    return trained, [p.numel() for model in frozen for p in model.parameters()]


def _new_bytes(before: dict[int, int]) -> int:
    return sum(size for address, size in storages().items() if address not in before)


def same_collectives() -> None:
    """gloo's collectives and those in place: equal, with a part inside the whole or beside it."""
    ranks, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(rank)
    whole = torch.randn(ranks, 7, generator=generator)
    part = torch.randn(7, generator=generator)
    gathered, summed = torch.empty(ranks * 7), torch.empty(7)
    torch.distributed.all_gather_into_tensor(gathered, part)
    torch.distributed.reduce_scatter_tensor(summed, whole.flatten())
    for wait in (False, True):
        for inside in (False, True):
            out = torch.zeros(ranks, 7)
            mine = out[rank].copy_(part) if inside else part
            works = gloo.gather_in_place(out, mine, async_op=wait)
            if works is not None:
                works.wait()
            assert torch.equal(out.flatten(), gathered)
            used = whole.clone()
            mine = used[rank] if inside else torch.zeros(7)
            works = gloo.scatter_in_place(mine, used, async_op=wait)
            if works is not None:
                works.wait()
            # More than two ranks may be added up in another order.
            assert (mine - summed).abs().max() <= (0 if ranks <= 2 else 1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        for wait in (False, True):
            for owner in range(ranks):
                plain, own = whole.to(dtype), whole.to(dtype)
                torch.distributed.reduce(plain, owner)
                works = gloo.sum_on_owner(own, owner, async_op=wait)
                if works is not None:
                    works.wait()
                assert rank != owner or torch.equal(own, plain)


def main(folder: Path) -> None:
    """Runs all scenarios of the folder in one group of ranks."""
    distributed.start()
    start.start()
    logging.basicConfig(format="%(message)s")
    # Says what runs.
    logging.getLogger("fd_large.kernels").setLevel(logging.DEBUG)
    same_collectives()
    kernels = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    results = {}
    for name, scenario in json.loads((folder / "scenarios.json").read_text()).items():
        run = tiny_run(**scenario.get("run", {}))
        with watching_sums(scenario.get("few_ranks")) as summed:
            result = engine_result(run, scenario["zero"], scenario.get("updates", UPDATES))
        results[name] = {**result, "summed": summed, "kernels": kernels}
    write_result(folder, results)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
