"""`python -m fd_large plan`: does a run fit, how fast, how long, before it waits in a queue."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

import tyro
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fd_large.cli.flags import parse_run
from fd_large.errors import ConfigError
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.rates import CARDS, Rates, rates_of
from fd_large.plan.search import Refused, checkpoint_bytes, num_steps, search
from fd_large.plan.step_time import Estimate
from fd_large.plan.workload import Workload
from fd_large.recipes.run import Run

IMAGENET = 1_281_167
NARROW = 96
"""Columns of a terminal below which the table leaves out times that the lines after it tell."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Plan a recipe on a cluster: memory, time, network, disk; arithmetic, without torch.

    Takes the recipe's own flags too: --recipe NAME, --batch.global_batch_size 8192, ...
    """

    gpus: int = 8
    """Ranks in all."""
    gpu: str = "h100"
    """Card: h100, h200, b200, a100, a100_40, l40s."""
    gpus_per_node: int = 8
    """Ranks of a node."""
    network: float = 400.0
    """Gb/s of each network card."""
    nics_per_node: int = 0
    """Network cards of a node; 0: one a GPU."""
    images: int = IMAGENET
    """Images of the data set, which set the steps of an epoch; ImageNet-1K by default."""
    kernels: Literal["fused", "reference"] = "fused"
    """What runs beside the matrix products."""
    rates: str = ""
    """JSON of measured rates, over those of the card; with --probe it is written."""
    probe: bool = False
    """Measure this machine first: its GPU, or CPU ranks as many as --gpus."""
    write: str = ""
    """Where to write the DeepSpeed JSON of the best setting."""
    rows: int = 5
    """Settings that are shown."""


def main(arguments: list[str]) -> int:
    """Plans and prints.

    Args:
        arguments: The words after `plan`.
    """
    mine, recipe = _split(arguments)
    flags = tyro.cli(PlanFlags, args=mine, prog="python -m fd_large plan", use_underscores=True)
    run = parse_run(recipe)
    if not run.has_teacher:
        raise ConfigError(
            f"--recipe: only distillation is planned; got {run.name}, of the task {run.task.name}, "
            "expected a recipe with a teacher. Its docstring has the arithmetic."
        )
    machine = _machine(flags, run)
    load = workload(run)
    good, bad = search(load, machine)
    console = Console(width=None if Console().is_terminal else 130)
    narrow = console.width < NARROW
    console.print(
        report(run, load, machine, good, bad, images=flags.images, rows=flags.rows, narrow=narrow)
    )
    if flags.write:
        if not good:
            raise ConfigError(
                "--write: no setting fits; got none to write, expected one. Use more GPUs."
            )
        _write("--write", flags.write, good[0].candidate.deepspeed(load.parameters))
        console.print(f"wrote {flags.write}", soft_wrap=True)
    return 0


def _write(flag: str, name: str, content: dict[str, Any]) -> None:
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{flag}: cannot be written; got {error}, expected a file in a folder that can be "
            "written. Name another one."
        ) from None


def workload(run: Run) -> Workload:
    """Returns what `plan` counts of a run that distils."""
    return Workload.of(
        run.student,
        run.teacher,
        image_size=run.data.image_size,
        teacher_image_size=run.objective.teacher_image_size,
        global_batch_size=run.batch.global_batch_size,
    )


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
    """Returns what is printed."""
    parts: list[Table | Text] = [_heading(run, load, machine)]
    if good:
        parts.append(_best_table(machine, good[:rows], _steps(run, images), narrow=narrow))
        parts.append(_details(run, load, good[0], machine, images))
    else:
        parts.append(Text("No setting fits; use more GPUs, or cards with more memory.\n"))
    if bad:
        parts.append(_refused_table(bad, rows))
    return Group(*parts)


def _heading(run: Run, load: Workload, machine: Machine) -> Text:
    cluster = machine.cluster
    student = sum(p.forward(1) for p in load.student_products)
    teacher = sum(p.forward(1) for p in load.teacher_products)
    network = ""
    if cluster.nodes > 1:
        network = f", {cluster.nics_per_node} x {cluster.nic_gigabits:g} Gb/s a node"
    return Text(
        f"{run.name}: {run.student.model} ({load.parameters / 1e6:,.1f}M parameters with its "
        f"projection, {student / 1e9:,.1f} GFLOP forward) learns from {run.teacher.model} "
        f"({sum(load.teacher_sizes) / 1e6:,.1f}M, {teacher / 1e9:,.1f} GFLOP), "
        f"{run.batch.global_batch_size} images a step\n"
        f"{cluster.gpus} x {machine.rates.name} on {cluster.nodes} "
        f"node{'s' if cluster.nodes > 1 else ''}{network}, "
        f"{machine.kernels if machine.fused else 'reference'} kernels\n"
    )


def _table(title: str) -> Table:
    # No frame: in 80 columns it would cost the words their ends.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("ZeRO", "teacher", "check-\npoints"):
        table.add_column(name, no_wrap=True)
    return table


def _best_table(machine: Machine, good: list[Estimate], steps: int, *, narrow: bool) -> Table:
    table = _table("Settings that work, best first")
    names = ["micro\nx accum.", "GB a\nrank", "compute\nms", "comm.\nms"]
    names += ["update\ns", "images\n/s", "MFU\n%", "days", "GPU-\nhours"]
    if narrow:
        names[2:4] = []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in good:
        seconds = one.seconds
        hours = seconds.total * steps / 3600
        table.add_row(
            _zero(one.candidate),
            one.candidate.teacher,
            "blocks" if one.candidate.checkpointing else "off",
            f"{one.candidate.micro_batch_size} x {seconds.accumulation}",
            f"{one.memory.total / 1e9:.1f}",
            *(
                []
                if narrow
                else [f"{seconds.computation * 1e3:,.0f}", f"{seconds.communication * 1e3:,.0f}"]
            ),
            _figure(seconds.total),
            f"{one.images_per_second:,.0f}",
            f"{100 * one.mfu:.1f}",
            _figure(hours / 24),
            _figure(hours * machine.cluster.gpus),
        )
    return table


def _details(run: Run, load: Workload, best: Estimate, machine: Machine, images: int) -> Text:
    memory, seconds = best.memory, best.seconds
    stored = checkpoint_bytes(load)
    keep = run.runtime.keep_last + 1
    longer = "computation" if seconds.computation >= seconds.communication else "communication"
    flags = best.candidate.flags(
        micro_batch_size=run.batch.micro_batch_size,
        placement=run.teacher.placement,
        activation_checkpointing=run.student.activation_checkpointing,
    )
    return Text(
        f"The first: states {memory.states / 1e9:.1f} GB + teacher {memory.teacher / 1e9:.1f} + "
        f"activations {memory.activations / 1e9:.1f} + buffers {memory.buffers / 1e9:.1f} = "
        f"{memory.total / 1e9:.1f} of {machine.rates.memory_bytes / 1e9:.0f} GB\n"
        f"A micro batch: matrix products {seconds.products * 1e3:,.0f} ms, the rest "
        f"{seconds.rest * 1e3:,.0f} ms, communication {seconds.communication * 1e3:,.0f} ms "
        f"({longer} decides); after the last one {seconds.finish * 1e3:,.0f} ms\n"
        f"FLOPs: MFU {100 * best.mfu:.1f} %, with recomputation "
        f"{100 * best.hardware_utilisation:.1f} % of {best.peak / 1e12:,.4g} TFLOP/s\n"
        f"Disk: a checkpoint is {_size(stored)}; {keep} at once, while one is written: "
        f"{_size(keep * stored)}\n"
        f"Run: {_steps(run, images):,} steps"
        + (f"; differs from the recipe by {flags}" if flags else "")
        + "\n"
    )


def _refused_table(bad: list[Refused], rows: int) -> Table:
    hidden = len(bad) - rows
    more = f" ({hidden} more do not either)" if hidden > 0 else ""
    table = _table(f"Settings that do not work{more}")
    table.add_column("why")
    for one in bad[:rows]:
        table.add_row(
            _zero(one.candidate),
            one.candidate.teacher,
            "blocks" if one.candidate.checkpointing else "off",
            one.reason,
        )
    return table


def _steps(run: Run, images: int) -> int:
    optim = run.optim
    return optim.max_steps or num_steps(optim.epochs, images, run.batch.global_batch_size)


def _zero(candidate: Candidate) -> str:
    return f"{candidate.stage}{' + hpZ' if candidate.hpz else ''}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _machine(flags: PlanFlags, run: Run) -> Machine:
    least = {"gpus": 1, "gpus_per_node": 1, "nics_per_node": 0, "images": 1, "rows": 1}
    for name, allowed in least.items():
        if getattr(flags, name) < allowed:
            raise ConfigError(
                f"--{name}: too few; got {getattr(flags, name)}, expected {allowed} or more. "
                "Mend it."
            )
    if not 0 < flags.network < inf:
        raise ConfigError(
            f"--network: no rate; got {flags.network:g}, expected Gb/s of a network card. Mend it."
        )
    cluster = Cluster(
        gpus=flags.gpus,
        gpus_per_node=flags.gpus_per_node,
        nic_gigabits=flags.network,
        nics_per_node=flags.nics_per_node or flags.gpus_per_node,
    )
    if flags.gpus > flags.gpus_per_node and flags.gpus % flags.gpus_per_node:
        raise ConfigError(
            f"--gpus: nodes of unequal size; got {flags.gpus} in nodes of {flags.gpus_per_node}, "
            "expected a multiple. Set --gpus_per_node."
        )
    return Machine(cluster=cluster, rates=_rates(flags, run), kernels=flags.kernels)


def _rates(flags: PlanFlags, run: Run) -> Rates:
    if not flags.probe:
        return rates_of(flags.gpu, flags.rates)
    # torch, which the rest of this command does without.
    from fd_large.plan.probe import probe

    rates = probe(
        run.student,
        image_size=run.data.image_size,
        ranks=flags.gpus,
        micro_batch_size=run.batch.micro_batch_size,
    )
    if flags.rates:
        _write("--rates", flags.rates, rates.to_dict())
    return rates


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Parts the words into this command's own and the recipe's."""
    own = {field.name for field in fields(PlanFlags)} | {"help", "no_probe"}
    mine: list[str] = []
    recipe: list[str] = []
    target = mine
    for word in arguments:
        if word.startswith("-") and not _is_number(word):
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            target = mine if name in own or word == "-h" else recipe
        target.append(word)
    return mine, recipe


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


assert set(CARDS) == {"h100", "h200", "b200", "a100", "a100_40", "l40s"}  # The flag's help.
