"""Rank program: runs of a covering array of options, by the trainer itself, in one group of ranks.

options.py FOLDER, with rows.json in it: {number: row of `covering`}. A run that is stopped begins
on one rank fewer, and goes on from its checkpoint; the groups are started in rising order. Writes
each run's losses of the steps that this group took. `plain_losses` is the same run in plain torch.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import scenarios
import torch
from covering import Factors, Row
from launch import read_results, run_ranks, write_result
from pictures import write_pictures

from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion, updates_per_epoch
from fd_large.engine.loop import Trainer, TrainingPlan
from fd_large.engine.opening import Opened, open_run
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.students import train_together
from fd_large.engine.zero import start
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Student
from fd_large.runtime.hooks import Hook, Setting, Update, Wish
from fd_large.tasks.distillation import target_statistics
from fd_large.tasks.distillation.heads.map_heads import Convolutional, ResizedMLP
from fd_large.tasks.distillation.heads.registry import HEADS
from fd_large.tasks.distillation.job import KNOWN, RUNNING, DistillationJob
from fd_large.tasks.distillation.normalisers import BY_STATISTICS, NORMALISERS
from fd_large.tasks.distillation.section import NamedTeacher, Summary, Teacher
from fd_large.tasks.jobs import job_of

STEPS, STOP = 3, 2
IMAGES = (23, 17)
"""Two datasets: with a batch of 18 the third step belongs to another epoch."""
GLOBAL_BATCH, SIDE = 18, 32
NAMES = ("first", "second", "third")
DATASETS = ("one", "two")
# Smaller than published: the published widths would take most of the time.
SMALL_HEADS = {
    "wide_convolutional": partial(Convolutional, adapted=24, hidden=32, last_side=3),
    "resized_mlp": partial(ResizedMLP, hidden=24),
}
ALL_NORMALISERS = tuple(NORMALISERS | BY_STATISTICS | RUNNING)
# The student's grid has 4 x 4 places.
VIT = Architecture(embed_dim=16, depths=(2,), num_heads=(2,), patch_size=8, image_size=SIDE)
FINE = ("vit_base_patch16", replace(VIT, depths=(1,), patch_size=4))
COARSE = Architecture(embed_dim=12, depths=(1,), num_heads=(2,), patch_size=16, image_size=2 * SIDE)
SWIN = Architecture(embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=2)
GRIDS = {
    "none": (("clip_vit_base_patch16", replace(VIT, embed_dim=24, depths=(1,))), {}),
    "bilinear": (FINE, {"interpolation": "bilinear"}),
    "bilinear_student": (FINE, {"interpolation": "bilinear_student"}),
    "bilinear_larger": (("swinv2_base", SWIN), {"interpolation": "bilinear_larger"}),
    "teacher_image_size": (("vit_base_patch16", COARSE), {"teacher_image_size": 2 * SIDE}),
}
"""How the grids of student and teacher meet: a teacher, and what its entry says."""
FACTORS = Factors(
    run={
        "ranks": (1, 2, 3),
        "zero": (1, 3),
        "accumulation": (1, 3),
        "stopped": (False, True),
        "weighting": ("fixed", "drop", "own_data"),
        "image_mixup": (False, True),
        "balanced": (False, True),
        "parts": (1, 2, 3),
    },
    part={
        "targets": ("map", "summary", "map summary"),
        "loss": (*KNOWN.losses, "0.9 cosine_of_map + 0.1 smooth_l1"),
        "normaliser": ALL_NORMALISERS,
        "head": tuple(HEADS),
        "grid": tuple(GRIDS),
    },
    # What the package refuses, or what no head of that kind leads to.
    excluded=[
        (("weighting", ("drop", "own_data")), ("parts", (1,))),
        (("weighting", ("own_data",)), ("image_mixup", (True,))),
        (("weighting", ("own_data",)), ("balanced", (False,))),
        (("loss", ("queue",)), ("targets", ("map", "map summary"))),
        (("loss", ("queue",)), ("normaliser", set(ALL_NORMALISERS) - {"none"})),
        (("loss", ("relation",)), ("targets", ("summary",))),
        (
            ("head", ("convolutional", "wide_convolutional")),
            ("grid", ("bilinear", "bilinear_student")),
        ),
        (("head", ("upsampling_mlp",)), ("grid", ("bilinear_larger",))),
    ],
)


def small_heads() -> None:
    """Makes heads of a fixed width narrower in this process."""
    HEADS.update(SMALL_HEADS)


def phases(row: Row) -> list[tuple[int, int]]:
    """The ranks that train a run, one group after another, and the step after which each ends."""
    ranks = row.run["ranks"]
    last = (ranks, STEPS)
    return [(max(1, ranks - 1), STOP), last] if row.run["stopped"] else [last]


def run_of(row: Row, name: str, folder: Path) -> Run:
    """The run that a row describes; its images and files of statistics are in the folder."""
    run = registry.get("quickstart")
    roots = [folder / dataset for dataset in DATASETS]
    balanced = " + ".join(
        f"{weight} {dataset}={root}"
        for weight, dataset, root in zip((0.6, 0.4), DATASETS, roots, strict=True)
    )
    own_data = row.run["weighting"] == "own_data"
    return replace(
        run,
        student=Student(
            model="vit_base_patch16",
            architecture=VIT,
            drop_path_rate=0.3,
            activation_checkpointing="off",
        ),
        teacher=Teacher(),
        objective=replace(run.objective, interpolation="none", teacher_image_size=0),
        teachers={
            NAMES[number]: _teacher(
                part,
                folder / f"{name}_{NAMES[number]}",
                placement="sharded" if row.run["zero"] == 3 else "replicated",
                datasets=(DATASETS, DATASETS[:1], DATASETS[1:])[number] if own_data else (),
            )
            for number, part in enumerate(row.parts)
        },
        weighting=replace(run.weighting, rule=row.run["weighting"]),
        data=replace(
            run.data,
            root=balanced if row.run["balanced"] else str(folder / DATASETS[0]),
            image_size=SIDE,
            image_mixup=row.run["image_mixup"],
            workers=0,
        ),
        optim=replace(
            run.optim,
            max_steps=STEPS,
            base_lr=0.1,
            warmup_lr=0.05,
            min_lr=0.01,
            warmup_epochs=0.0,
            clip_norm=0.5,
        ),
        batch=replace(run.batch, global_batch_size=GLOBAL_BATCH),
        engine=replace(run.engine, precision="float32"),
        eval=replace(run.eval, root=""),
        runtime=replace(run.runtime, run_dir=str(folder / name), save_every=100),
    )


def _teacher(
    part: dict[str, Any], file: Path, *, placement: str, datasets: tuple[str, ...]
) -> NamedTeacher:
    (model, architecture), grid = GRIDS[part["grid"]]
    targets = tuple(part["targets"].split())
    entry = NamedTeacher(
        model=model,
        architecture=architecture,
        source="random",
        placement=placement,
        targets=targets,
        loss=part["loss"],
        normaliser=part["normaliser"],
        head=part["head"],
        datasets=datasets,
        **{"interpolation": "none", "teacher_image_size": 0, **grid},
    )
    if part["loss"] == "relation" and "summary" in targets:
        entry = replace(entry, summary=Summary(loss="cosine"))
    if part["normaliser"] in BY_STATISTICS:
        if "map" in targets:
            entry = replace(entry, target_statistics=f"{file}_map")
        if "summary" in targets:
            summary = replace(entry.summary, target_statistics=f"{file}_summary")
            entry = replace(entry, summary=summary)
    return entry


def write_statistics(run: Run) -> None:
    """Writes the files of statistics that a run reads: made-up numbers for its own targets."""
    entries = run.taught_by
    raw = DistillationJob(run.with_taught_by({n: e.as_it_is() for n, e in entries.items()}))
    raw.build(bfloat16=False, node_size=1, persistence_threshold=0)
    task = raw.task_around(raw.teachers)
    generator = torch.Generator().manual_seed(0)
    for target in task.targets:
        entry = entries[target.teacher]
        if entry.setting("normaliser", target.kind) in BY_STATISTICS:
            width = raw.teachers[target.teacher].width
            mean, *factor = torch.randn(width + 1, width, generator=generator).double()
            root = torch.stack(factor)
            found = target_statistics.statistics_of(
                mean, root @ root.T / width, raw.target_facts(task, target)
            )
            target_statistics.write(Path(entry.setting("target_statistics", target.kind)), found)


def schedule_of(run: Run) -> CosineSchedule:
    """The learning rates."""
    peak, begin, end = run.optim.rates(GLOBAL_BATCH)
    return CosineSchedule(peak, begin, end, STEPS, 0)


def batches_of(job: Any, samples: Any, first: int, micro: int) -> Iterator[Batch]:
    """This rank's micro batches from a step on."""
    per_epoch = updates_per_epoch(len(samples), GLOBAL_BATCH)
    for epoch in range(first // per_epoch, STEPS):
        begin = max(0, first - epoch * per_epoch)
        portion = Portion(epoch, begin, micro, distributed.rank(), distributed.world_size())
        yield from job.batches(samples, portion)


def plain_losses(run: Run) -> list[float]:
    """One process, no engine, whole batches."""
    job = DistillationJob(run)
    batches = batches_of(job, job.open_samples(), 0, GLOBAL_BATCH)
    return scenarios.plain_losses(run, STEPS, batches=batches, schedule=schedule_of(run))


def losses_of(rows: dict[str, Row], folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Each run's losses, on its ranks and in one plain process."""
    for dataset, images in zip(DATASETS, IMAGES, strict=True):
        write_pictures(folder / dataset, images)
    for stage, zero in ((1, scenarios.ZERO1), (3, scenarios.ZERO3)):
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    (folder / "rows.json").write_text(json.dumps({n: row._asdict() for n, row in rows.items()}))
    plain = {}
    for name, row in rows.items():
        run = run_of(row, name, folder)
        write_statistics(run)
        plain[name] = plain_losses(run)
    ours: dict[str, list[float]] = {name: [] for name in rows}
    for ranks in FACTORS.run["ranks"]:
        found = folder / f"on_{ranks}"
        found.mkdir()
        run_ranks(__file__, folder, ranks=ranks, timeout=3000, results=found)
        for name, taken in read_results(found, ranks)[0].items():
            ours[name] += taken
    return {name: (ours[name], plain[name]) for name in rows}


class Losses(Hook):
    """Notes the losses; wishes to stop after a step."""

    def __init__(self, last: int) -> None:
        self._last, self.losses, self._next = last, [], 0

    def on_start(self, setting: Setting) -> None:
        self._next = setting.first_update

    def wish(self) -> Wish:
        return Wish(stop=self._next + 1 == self._last < STEPS)

    def after_update(self, update: Update) -> None:
        self._next = update.index + 1
        self.losses.append(update.loss)


def trained(opened: Opened, last: int) -> list[float]:
    """Trains an opened run up to a step; returns the losses of the steps that this took."""
    run, job, losses = opened.run, opened.job, Losses(last)
    per_epoch = updates_per_epoch(len(opened.samples), GLOBAL_BATCH)
    setting = Setting(
        folder=opened.folder,
        facts={},
        first_update=opened.checkpoints.resume(),
        total_updates=STEPS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=opened.micro_batch_size,
        accumulation=opened.accumulation,
        world_size=distributed.world_size(),
        log_every=1,
    )
    plan = TrainingPlan(schedule_of(run), per_epoch, opened.accumulation, run.runtime.seed)
    trainer = Trainer(opened.engine, plan, [losses], setting, checkpoints=opened.checkpoints)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        ranks = distributed.rank(), distributed.world_size()
        return job.batches(opened.samples, Portion(epoch, first, opened.micro_batch_size, *ranks))

    train_together([trainer], batches)
    return losses.losses


def main(folder: Path) -> None:
    """Trains all runs that this number of ranks has a part in."""
    # What is imported is not looked through again after each run.
    gc.freeze()
    small_heads()
    distributed.start()
    world, results = distributed.world_size(), {}
    for name, row in json.loads((folder / "rows.json").read_text()).items():
        row = Row(**row)
        run = run_of(row, name, folder)
        config = str(folder / f"zero{row.run['zero']}.json")
        micro = GLOBAL_BATCH // world // row.run["accumulation"]
        run = replace(run, batch=replace(run.batch, micro_batch_size=micro))
        for ranks, last in phases(row):
            if ranks != world:
                continue
            Path(run.run_dir()).mkdir(exist_ok=True)
            opened = open_run(run, job_of, deepspeed_config=config)
            results.setdefault(name, []).extend(trained(opened, last))
            opened.engine.deepspeed.destroy()
            del opened
            start.forget_engines()
            gc.collect()
    write_result(folder / f"on_{world}", results)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
