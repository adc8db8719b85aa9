"""The printed report of `plan`: settings that fit, the best setting's costs, and the others."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fd_large.cli.output import size
from fd_large.cli.plan_workload import cached_folders, steps_of
from fd_large.errors import ConfigError
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.peak_memory import on_disk
from fd_large.plan.search import SAME_TIME, Refused, checkpoint_bytes
from fd_large.plan.step_time import OF_HOOKS, WITHOUT_HOOKS, Between, Estimate
from fd_large.plan.workload import Workload
from fd_large.recipes.architectures import brings_model
from fd_large.recipes.run import Run
from fd_large.runtime import disks

LEAST = 0.001
"""Smallest number of seconds or hours that is printed."""


def figure(value: float) -> str:
    """Returns `value`, a number of seconds or hours, as text with two significant digits.

    A value below `LEAST` gives "<" and the number `LEAST`.
    """
    if value < LEAST:
        return f"<{LEAST}"
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def figures(between: Between) -> str:
    """Returns a range of seconds or hours as text, such as "1.2-1.5", or "1.2" for equal ends."""
    low, high = map(figure, between)
    return low if low == high else f"{low}-{high}"


def report(
    run: Run,
    load: Workload,
    machine: Machine,
    good: list[Estimate],
    bad: list[Refused],
    *,
    images: int,
    rows: int,
    narrow: bool,
) -> Group:
    """Returns the report that is printed.

    Args:
        load: FLOPs and bytes of a step.
        good: The settings that fit, with the best one first.
        bad: The settings that do not fit.
        images: Number of images of the dataset, which decides the steps of an epoch.
        rows: Largest number of rows of each table.
        narrow: Whether the table omits columns that the lines after it repeat.
    """
    parts: list[Table | Text] = [_heading(run, load, machine)]
    if good:
        parts.append(_best_table(machine, load, good[:rows], steps_of(run, images), narrow=narrow))
        parts.append(_details(run, load, good[0], machine, images))
    else:
        parts.append(
            Text(
                "No setting fits; use more GPUs, GPUs with more memory, or a disk "
                "(--engine.nvme_path FOLDER, docs/disk.md).\n"
            )
        )
    if bad:
        parts.append(_refused_table(bad, load, rows))
    if run.engine.nvme_path:
        parts.append(_disk_line(run, load, machine))
    return Group(*parts)


def _disk_line(run: Run, load: Workload, machine: Machine) -> Text:
    folder = run.engine.nvme_path
    disks.check_state_folder(folder, 1)
    try:
        speed, free = disks.write_speed(Path(folder)), shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(
            f"engine.nvme_path: {folder} cannot be tested; got {error.strerror}, expected a "
            "folder on a local disk. Set --engine.nvme_path to another folder."
        ) from None
    needs = on_disk(load, machine, speed=speed, average=bool(run.optim.ema_decay))
    return Text(
        "State on a disk (ds_configs/zero3_nvme.json, every block checkpointed, 1 image at a "
        "time):\n"
        f"  {needs.memory / 1e9:.1f} GB of memory a rank; {size(needs.disk)} on each node's disk "
        f"({folder} has {size(free)} free{'' if needs.disk <= free else ': TOO LITTLE'});\n  up to "
        f"{figure(needs.seconds)} s more for each step at the {speed / 1e9:.2f} GB/s that it is "
        "written with now\n"
    )


def _heading(run: Run, load: Workload, machine: Machine) -> Text:
    cluster = machine.cluster
    counts = load.counts[False]
    network = ""
    if cluster.nodes > 1:
        network = f", {cluster.nics_per_node} x {cluster.nic_gigabits:g} Gb/s per node"
    teacher = ""
    if load.teacher_sizes:
        models = run.frozen_models.values()
        named = [model.source if brings_model(model.source) else model.model for model in models]
        name = f"teacher{'s' * (len(named) > 1)} {', '.join(named)}" if named else "frozen model"
        teacher = (
            f"  {name}: {sum(load.teacher_sizes) / 1e6:,.1f}M parameters, "
            f"{counts.flops_per_image('inference') / 1e9:,.1f} GFLOP\n"
        )
    for name, folder in cached_folders(run).items():
        teacher += f"  {name}: cached targets in {folder}\n"
    learning = [f"{name}: {student.model}" for name, student in run.students.items()]
    students, whose = f"student {run.student.model}: ", "its"
    if learning:
        students, whose = f"students {', '.join(learning)}: ", "their"
    return Text(
        f"{run.name}, {run.batch.global_batch_size} images per step\n"
        f"  {students}{load.parameters / 1e6:,.1f}M parameters with {whose} "
        f"{'projection' if len(run.frozen_models) == 1 else 'heads'}, "
        f"{counts.flops_per_image('forward') / 1e9:,.1f} GFLOP\n{teacher}"
        f"  {cluster.gpus} x {machine.rates.name} on {cluster.nodes} "
        f"node{'s' if cluster.nodes > 1 else ''}{network}, "
        f"{'fused' if counts.fused else 'reference'} kernels\n"
    )


def _table(title: str) -> Table:
    # No frame, so that all cells fit into 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("ZeRO", "teacher", "check-\npoints"):
        table.add_column(name, no_wrap=True)
    return table


def _best_table(
    machine: Machine, load: Workload, good: list[Estimate], steps: int, *, narrow: bool
) -> Table:
    table = _table(
        "Settings that fit, fastest first\n"
        f"(within {100 * SAME_TIME:.0f} %: least communication first)"
    )
    names = ["micro\nx accum.", "GB per\nrank", "step\ns", "hours", "GPU-\nhours"]
    if not narrow:
        names += ["compute\nms", "comm.\nms", "images\n/s", "MFU\n%"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for setting in good:
        seconds = setting.seconds
        hours = seconds.between.scaled(steps / 3600)
        cells = [
            f"{seconds.computation * 1e3:,.0f}",
            f"{seconds.communication * 1e3:,.0f}",
            f"{setting.images_per_second:,.0f}",
            f"{100 * setting.mfu:.1f}",
        ]
        table.add_row(
            _zero(setting.candidate),
            _teacher(setting.candidate, load),
            "blocks" if setting.candidate.checkpointing else "off",
            f"{setting.candidate.micro_batch_size} x {seconds.accumulation}",
            f"{setting.memory.total / 1e9:.1f}",
            figures(seconds.between),
            figures(hours),
            figures(hours.scaled(machine.cluster.gpus)),
            *([] if narrow else cells),
        )
    return table


def _details(run: Run, load: Workload, best: Estimate, machine: Machine, images: int) -> Text:
    memory, seconds = best.memory, best.seconds
    stored = checkpoint_bytes(load)
    keep = run.runtime.keep_last + 1
    longer = "computation" if seconds.computation >= seconds.communication else "communication"
    cached = cached_folders(run)
    placements = {
        name: getattr(model, "placement", "replicated")
        for name, model in (run.frozen_models or {"teacher": run.teacher}).items()
        if name not in cached
    }
    whole = [list(placements)[place] for place in load.smallest_first[: best.candidate.whole]]
    flags = {f"--deepspeed_config {best.candidate.shipped_config}": None}
    for name, student in run.each_student().items():
        student_flags = best.candidate.flags(
            micro_batch_size=run.batch.micro_batch_size,
            placements=placements,
            whole=whole,
            activation_checkpointing=student.student.activation_checkpointing,
        )
        whose = f"--students.{name}." if name else "--student."
        flags |= dict.fromkeys(flag.replace("--student.", whose) for flag in student_flags)
    parts = ", ".join(
        f"{name} {value * 1e3:,.0f}{'' if i else ' ms'}"
        for i, (name, value) in enumerate(seconds.parts.items())
    )
    teacher = _teachers_share(run, load, best, machine)
    lines = [
        f"Memory of a rank in the first setting: {memory.total / 1e9:.1f} of "
        f"{machine.rates.memory_bytes / 1e9:.0f} GB",
        f"  states {memory.states / 1e9:.1f}, teacher {memory.teacher / 1e9:.1f}, "
        f"activations {memory.activations / 1e9:.1f}, buffers {memory.buffers / 1e9:.1f}",
        f"Time of a micro-batch: limited by {longer}",
        f"  {parts}, communication {seconds.communication * 1e3:,.0f}; after the last micro-batch "
        f"{seconds.finish * 1e3:,.0f}",
        *_said_of_times(load, machine),
        f"FLOPs: MFU {100 * best.mfu:.1f} %, with recomputation "
        f"{100 * best.hardware_utilisation:.1f} % of {best.peak / 1e12:,.4g} TFLOP/s",
        f"Disk: {size(stored)} per checkpoint{' of all' if run.students else ''}; "
        f"{size(keep * stored)} for {keep}, of which one is being written",
        *([teacher] if teacher else []),
        f"Length: {steps_of(run, images):,} steps",
    ]
    lines += ["To train with it, pass:", *(f"  {flag}" for flag in flags)]
    return Text("\n".join(lines) + "\n")


def _said_of_times(load: Workload, machine: Machine) -> list[str]:
    """Returns sentences on how the report's times were estimated, and how wrong they may be."""
    if load.phases:
        where = "a step of this task, timed on one device, and from measured collectives"
    elif machine.rates.name.endswith("measured"):
        where = "measured rates of single operations, not from a step of this task"
    else:
        where = "data sheets and the share of them that steps of other software reach"
    return [
        f"These times are computed from {where}. The ranges in the table are "
        f"{WITHOUT_HOOKS.low:g} to {WITHOUT_HOOKS.high:g} times the computed time "
        f"({OF_HOOKS.low:g} to {OF_HOOKS.high:g} times for ZeRO-3's hooks), within which clean "
        "public steps lie (docs/scaling.md), without waiting for images"
        + ("" if load.phases else ". --probe measures this machine")
    ]


def _teachers_share(run: Run, load: Workload, best: Estimate, machine: Machine) -> str:
    """Returns a sentence on the costs of the teachers, or "" if the run's steps run no teacher.

    The sentence states the teachers' share of a step's FLOPs. It also states the size of a stored
    map below which reading the map, at 1 GB/s, takes less time than a rank spends on an image in
    `best`.
    """
    counts = load.counts[False]
    teacher = counts.flops_per_image("inference")
    rest = counts.flops_per_image("forward") + counts.flops_per_image("backward")
    if not run.frozen_models or not teacher:
        return ""
    # The size of a map that takes as long to read, at 1 GB/s, as a rank spends on an image.
    most = 1e9 * best.seconds.total * machine.cluster.gpus / best.images
    return (
        f"Teacher: {100 * teacher / (teacher + rest):.0f} % of the FLOPs; storing its maps saves "
        f"time if each map is used more than once and is smaller than {size(most)}, for ranks "
        f"that read 1 GB/s (fd-large cache {run.name} OUT --plan prints the size of a map)"
    )


def _refused_table(bad: list[Refused], load: Workload, rows: int) -> Table:
    more = f", {rows} of {len(bad)}" if len(bad) > rows else ""
    table = _table(f"Settings that do not fit{more}")
    table.add_column("why")
    for setting in bad[:rows]:
        table.add_row(
            _zero(setting.candidate),
            _teacher(setting.candidate, load),
            "blocks" if setting.candidate.checkpointing else "off",
            setting.reason,
        )
    return table


def _teacher(candidate: Candidate, load: Workload) -> str:
    """Returns the placement of the teachers on the ranks as text for a table.

    The text is `candidate.teacher`, such as "sharded", if all teachers are placed alike.
    "sharded 1/2" means that one of two teachers is sharded, and the other is whole on every rank.
    """
    count = len(load.teachers)
    part = f" {count - candidate.whole}/{count}" if candidate.whole else ""
    return f"{candidate.teacher}{part}"


def _zero(candidate: Candidate) -> str:
    return f"{candidate.stage}{' + hpZ' if candidate.hpz else ''}"
