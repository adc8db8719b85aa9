"""`python -m fd_large plan`: whether a run fits a cluster, how fast it is, how long it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fd_large.cli.arguments import TakesRunFile, parse_with_recipe
from fd_large.cli.output import size, tables
from fd_large.errors import ConfigError
from fd_large.plan import kept_counts
from fd_large.plan.cached_targets import largest_map_that_pays
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.counts import NOTHING, Counts, Line, of_sizes
from fd_large.plan.disk import on_disk
from fd_large.plan.phases import Phases
from fd_large.plan.phases import read as read_phases
from fd_large.plan.rates import CARDS, Rates, rates_of
from fd_large.plan.search import Refused, checkpoint_bytes, num_steps, search
from fd_large.plan.step_time import Estimate
from fd_large.plan.workload import Workload, frozen_in_bfloat16, together
from fd_large.recipes import registry
from fd_large.recipes.architectures import brings_model
from fd_large.recipes.fields import at_least, flat, plain, positive, require
from fd_large.recipes.run import Run
from fd_large.recipes.sections import ADAMW, AUTO, RANDOM, FrozenModel, Student
from fd_large.runtime import disks
from fd_large.tasks.distillation.section import cached_folder

if TYPE_CHECKING:
    from fd_large.kernels.choose import Device

IMAGENET = 1_281_167
NARROW = 96
"""Columns of a terminal below which the table leaves out times that the lines after it give."""
Kernels = Literal["fused", "reference"]

SHAPES = (
    *("student.", "teacher.", "teachers.", "objective.", "weighting.rule", "task."),
    "data.image_size",
)
"""Beginnings of the fields that may decide what a step computes, but for these:"""
NO_SHAPES = (
    *(f"student.{name}" for name in ("init", "init_allow", "initialization")),
    "student.activation_checkpointing",
    *(
        f"{teacher}.{name}"
        for teacher in ("teacher", "teachers.*")
        for name in ("allow", "placement", "source", "statistics")
    ),
    "teachers.*.datasets",
    "teachers.*.weight",
    "task.distillation.*",
)


@dataclass(frozen=True, kw_only=True)
class Plan(TakesRunFile):
    """Plan a recipe on a cluster: memory, time, network, disk; from shapes, without a GPU.

    Fields of the recipe (--batch.global_batch_size 8192 ...) follow as in training;
    `python -m fd_large train --help` lists them.
    """

    # Run of record that is planned; without it quickstart.
    recipe: str = registry.DEFAULT_RECIPE
    # Number of ranks, one a GPU.
    gpus: int = 8
    # Card: h100, h200, b200, a100, a100_40 or l40s.
    gpu: str = "h100"
    # Ranks on each node.
    gpus_per_node: int = 8
    # Rate of each network card in Gb/s.
    network: float = 400.0
    # Network cards of each node; 0: one for each GPU.
    nics_per_node: int = 0
    # Images of the dataset, which decide the steps of an epoch; the default is ImageNet-1K.
    images: int = IMAGENET
    # fused: the fused kernels, on cards that have them (h100, h200, a100, a100_40). reference:
    # plain torch.
    kernels: Kernels = "fused"
    # JSON of measured rates, which replace those of the card; with --probe it is written. Empty:
    # the card's rates.
    rates: str = ""
    # Measure this machine first: its GPU, or as many CPU ranks as --gpus says.
    probe: bool = False
    # File for the DeepSpeed JSON of the best setting; empty: it is not written.
    write: str = ""
    # How many settings are shown.
    rows: int = 5

    def __post_init__(self) -> None:
        rates_of(self.gpu)
        at_least("--gpus", self.gpus, 1, "ranks")
        at_least("--gpus_per_node", self.gpus_per_node, 1, "ranks")
        at_least("--nics_per_node", self.nics_per_node, 0, "network cards")
        at_least("--images", self.images, 1, "images")
        at_least("--rows", self.rows, 1, "settings")
        positive("--network", self.network)
        require(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            "--gpus: nodes of unequal size",
            f"{self.gpus} in nodes of {self.gpus_per_node}",
            "a multiple",
            "Set --gpus_per_node",
        )


def main(arguments: list[str]) -> int:
    """Plans and prints."""
    given = parse_with_recipe(Plan, arguments, command="plan", recipe=registry.DEFAULT_RECIPE)
    own = given.own
    cluster = Cluster(
        gpus=own.gpus,
        gpus_per_node=own.gpus_per_node,
        nic_gigabits=own.network,
        nics_per_node=own.nics_per_node or own.gpus_per_node,
    )
    load, machine, good, bad = plan(
        given.run, cluster, gpu=own.gpu, rates=own.rates, probe=own.probe, kernels=own.kernels
    )
    console = tables()
    narrow = console.width < NARROW
    console.print(
        report(given.run, load, machine, good, bad, images=own.images, rows=own.rows, narrow=narrow)
    )
    if own.write:
        if not good:
            raise ConfigError(
                "--write: no setting fits; got none to write, expected one. Use more GPUs."
            )
        _write("--write", own.write, good[0].candidate.deepspeed())
        console.print(f"wrote {own.write}", soft_wrap=True)
    return 0


def plan(
    run: Run,
    cluster: Cluster,
    *,
    gpu: str = "h100",
    rates: str = "",
    probe: bool = False,
    kernels: Kernels = "fused",
) -> tuple[Workload, Machine, list[Estimate], list[Refused]]:
    """Searches the settings of a run on a cluster.

    Args:
        run: The recipe.
        cluster: Ranks, nodes and network.
        gpu: Name of the card.
        rates: File of measured rates, which replace those of the card; with `probe` it is written.
        probe: Whether this machine is measured first.
        kernels: The fused kernels where the card has them, or plain torch.

    Returns: The work, the machine, the settings that fit, fastest first, and those that do not.
    Raises: FDError: if something cannot be planned or read.
    """
    # The counts of a recipe's own teachers are kept under the names that it has for them.
    runs = [
        one if one.frozen_models == _of_record(one) else _as_trained(one)
        for one in run.each_student().values()
    ]
    phases: list[Phases | None] = [None] * len(runs)
    if probe:
        # torch, which the rest of this command does without.
        from fd_large.cli.plan_probe import probe as measure

        measured, phases = measure([_as_trained(one) for one in runs], ranks=cluster.gpus)
        if rates:
            timed = {
                _phases_key(run, measured): one.to_plain()
                for run, one in zip(runs, phases, strict=True)
                if one
            }
            _write("--rates", rates, measured.to_dict() | {"phases": timed})
    else:
        measured = rates_of(gpu, rates)
        if rates:
            phases = [read_phases(rates, _phases_key(run, measured)) for run in runs]
    machine = Machine(cluster=cluster, rates=measured)
    shared = NOTHING
    if len(runs) > 1:
        shared = _shared_bytes(_as_trained(runs[0]), measured, kernels)
    loads = [
        replace(workload(run, measured, kernels), phases=timed)
        for run, timed in zip(runs, phases, strict=True)
    ]
    load = together(loads, shared)
    return load, machine, *search(load, machine)


def _phases_key(run: Run, rates: Rates) -> str:
    """Returns the name of a run's phases in a file of rates: what decides how long they take."""
    fields = {name: plain(flat(run)[name]) for name in ("optim.name", "engine.compile")}
    return kept_counts.key(shape_fields(run) | fields, rates.name, "phases")


def _of_record(run: Run) -> Mapping[str, FrozenModel] | None:
    """The frozen models of the recipe of record that a run is made of; None if it is of another."""
    return registry.get(run.name).frozen_models if run.name in registry.RECIPES else None


def _as_trained(run: Run) -> Run:
    """Returns the run with the frozen models that its sources bring, or that their files show."""
    from_source = {
        name: section
        for name, section in run.frozen_models.items()
        if brings_model(section.source) or section.model == AUTO
    }
    if not from_source:
        return run
    # They import torch, which a recipe of record does without.
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.jobs import job_of

    for name, section in from_source.items():
        require(
            section.model != AUTO or section.source not in ("", RANDOM),
            f"{name}.model: auto takes the model that the weights show",
            f"{name}.source {section.source!r}",
            "weights",
            f"Set --{name}.source, or name a model",
        )
    # The student's weights decide no shape.
    untrained = replace(run, student=replace(run.student, init=""))
    return replace(job_of(untrained).settle(sources_of(job_of)), student=run.student)


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


def workload(run: Run, rates: Rates = CARDS["h100"], kernels: Kernels = "fused") -> Workload:
    """Returns what is planned of a run on a card: kept counts if there are any, or new ones.

    Raises: FDError: if the run's models cannot be built.
    """
    counts = None
    # Those that are kept have the teachers, which cached targets stand for.
    if rates.overlap and rates.bfloat16 and not _cached(run):
        counts = kept_counts.read(kept_counts.key(shape_fields(run), rates.capability, kernels))
    return Workload(
        counts=counts or count_anew(run, rates, kernels),
        global_batch_size=run.batch.global_batch_size,
        frozen_dtype=run.frozen_dtype,
        moments=_moments(run),
        may_split_frozen=bool(run.frozen_models),
    )


def _moments(run: Run) -> int:
    """Returns how many numbers the optimiser keeps of each parameter."""
    if run.optim.name == ADAMW:
        return 2
    # It imports torch, which a recipe of record does without.
    from fd_large.engine.zero.optimizer import moments_of

    return len(moments_of(run.optim))


def count_anew(run: Run, rates: Rates, kernels: Kernels) -> dict[bool, Counts]:
    """Counts a run on a card, without activation checkpointing and with it; takes seconds.

    Raises: FDError: if the run's models cannot be built.
    """
    # They import torch, which a recipe of record does without.
    from fd_large.engine.count import count
    from fd_large.tasks.jobs import job_of

    micro_batch_size = run.batch.micro_batch_size
    each = [
        count(
            job_of(run),
            _device(rates, kernels),
            bfloat16=rates.bfloat16,
            frozen_bfloat16=frozen_in_bfloat16(run.frozen_dtype, rates.bfloat16),
            micro_batch_size=1 if micro_batch_size == "auto" else micro_batch_size,
            image_size=side,
        )
        for side in sorted(run.data.image_sizes) or (0,)
    ]
    return {wrapped: of_sizes([counts[wrapped] for counts in each]) for wrapped in each[0]}


def _shared_bytes(run: Run, rates: Rates, kernels: Kernels) -> Line:
    """Returns the bytes of a micro-batch that several students take one after another."""
    from fd_large.engine.count import shared_bytes
    from fd_large.tasks.jobs import job_of

    half = frozen_in_bfloat16(run.frozen_dtype, rates.bfloat16)
    return shared_bytes(job_of(run), _device(rates, kernels), frozen_bfloat16=half)


def _device(rates: Rates, kernels: Kernels) -> Device:
    """Returns the card that a count stands for."""
    from fd_large.kernels.choose import Device

    major, _, minor = rates.capability.partition(".")
    return Device(
        (int(major), int(minor)) if rates.capability else None,
        on_gpu=rates.overlap,
        wish="auto" if kernels == "fused" else "reference",
    )


def shape_fields(run: Run) -> dict[str, Any]:
    """Returns the fields that may decide what a step computes, where they differ from defaults.

    What is automatic follows from the others.
    """
    default = flat(Run(name=run.name, student=Student(model=run.student.model)))
    default.pop("student.model")
    fields = {name: plain(value) for name, value in flat(run).items() if name.startswith(SHAPES)}
    return {
        name: value
        for name, value in fields.items()
        if not any(fnmatchcase(name, pattern) for pattern in NO_SHAPES)
        and value not in (AUTO, plain(default.get(name, "")))
    }


def _cached(run: Run) -> dict[str, str]:
    """Folders of cached targets by the section of the teacher that they stand for."""
    folders = {name: cached_folder(model.source) for name, model in run.frozen_models.items()}
    return {name: folder for name, folder in folders.items() if folder}


def steps_of(run: Run, images: int) -> int:
    """Returns the steps of a run on a dataset of that many images."""
    optim = run.optim
    return optim.max_steps or num_steps(optim.epochs, images, run.batch.global_batch_size)


def figure(value: float) -> str:
    """Returns a number of hours or days as text."""
    if value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
        parts.append(_best_table(machine, load, good[:rows], steps_of(run, images), narrow=narrow))
        parts.append(_details(run, load, good[0], machine, images))
    else:
        parts.append(
            Text(
                "No setting fits; use more GPUs, cards with more memory, or a disk "
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
            f"engine.nvme_path: {folder} cannot be measured; got {error.strerror}, expected a "
            "folder on a local disk. Set --engine.nvme_path to another one."
        ) from None
    found = on_disk(load, machine, speed=speed, average=bool(run.optim.ema_decay))
    return Text(
        "State on a disk (ds_configs/zero3_nvme.json, every block checkpointed, 1 image at a "
        "time):\n"
        f"  {found.memory / 1e9:.1f} GB of memory a rank; {size(found.disk)} on a node's disk, of "
        f"which {folder} has {size(free)} free{'' if found.disk <= free else ': TOO LITTLE'};\n"
        f"  up to {figure(found.seconds)} s more for each step at the {speed / 1e9:.2f} GB/s that "
        "it is written with now\n"
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
        named = [one.source if brings_model(one.source) else one.model for one in models]
        name = f"teacher{'s' * (len(named) > 1)} {', '.join(named)}" if named else "frozen model"
        teacher = (
            f"  {name}: {sum(load.teacher_sizes) / 1e6:,.1f}M parameters, "
            f"{counts.flops('inference', 1) / 1e9:,.1f} GFLOP\n"
        )
    for name, folder in _cached(run).items():
        teacher += f"  {name}: cached targets in {folder}\n"
    learning = [f"{name}: {one.model}" for name, one in run.students.items()]
    students, whose = f"student {run.student.model}: ", "its"
    if learning:
        students, whose = f"students {', '.join(learning)}: ", "their"
    return Text(
        f"{run.name}, {run.batch.global_batch_size} images per step\n"
        f"  {students}{load.parameters / 1e6:,.1f}M parameters with {whose} "
        f"{'projection' if len(run.frozen_models) == 1 else 'heads'}, "
        f"{counts.flops('forward', 1) / 1e9:,.1f} GFLOP\n{teacher}"
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
    table = _table("Settings that fit, best first")
    names = ["micro\nx accum.", "GB per\nrank", "compute\nms", "comm.\nms"]
    names += ["step\ns", "images\n/s", "MFU\n%", "days", "GPU-\nhours"]
    if narrow:
        names[2:4] = []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in good:
        seconds = one.seconds
        hours = seconds.total * steps / 3600
        table.add_row(
            _zero(one.candidate),
            _teacher(one.candidate, load),
            "blocks" if one.candidate.checkpointing else "off",
            f"{one.candidate.micro_batch_size} x {seconds.accumulation}",
            f"{one.memory.total / 1e9:.1f}",
            *(
                []
                if narrow
                else [f"{seconds.computation * 1e3:,.0f}", f"{seconds.communication * 1e3:,.0f}"]
            ),
            figure(seconds.total),
            f"{one.images_per_second:,.0f}",
            f"{100 * one.mfu:.1f}",
            figure(hours / 24),
            figure(hours * machine.cluster.gpus),
        )
    return table


def _details(run: Run, load: Workload, best: Estimate, machine: Machine, images: int) -> Text:
    memory, seconds = best.memory, best.seconds
    stored = checkpoint_bytes(load)
    keep = run.runtime.keep_last + 1
    longer = "computation" if seconds.computation >= seconds.communication else "communication"
    cached = _cached(run)
    placements = {
        name: getattr(model, "placement", "replicated")
        for name, model in (run.frozen_models or {"teacher": run.teacher}).items()
        if name not in cached
    }
    whole = [list(placements)[place] for place in load.smallest_first[: best.candidate.whole]]
    flags: dict[str, None] = {}
    for name, one in run.each_student().items():
        own = best.candidate.flags(
            micro_batch_size=run.batch.micro_batch_size,
            placements=placements,
            whole=whole,
            activation_checkpointing=one.student.activation_checkpointing,
        )
        whose = f"--students.{name}." if name else "--student."
        flags |= dict.fromkeys(flag.replace("--student.", whose) for flag in own)
    parts = ", ".join(
        f"{name} {value * 1e3:,.0f}{'' if i else ' ms'}"
        for i, (name, value) in enumerate(seconds.parts.items())
    )
    teacher = _teachers_share(run, load, machine)
    lines = [
        f"Memory of a rank in the best setting: {memory.total / 1e9:.1f} of "
        f"{machine.rates.memory_bytes / 1e9:.0f} GB",
        f"  states {memory.states / 1e9:.1f}, teacher {memory.teacher / 1e9:.1f}, "
        f"activations {memory.activations / 1e9:.1f}, buffers {memory.buffers / 1e9:.1f}",
        f"Time of a micro-batch: {longer} decides",
        f"  {parts}, communication {seconds.communication * 1e3:,.0f}; after the last one "
        f"{seconds.finish * 1e3:,.0f}",
        *_said_of_times(load, machine),
        f"FLOPs: MFU {100 * best.mfu:.1f} %, with recomputation "
        f"{100 * best.hardware_utilisation:.1f} % of {best.peak / 1e12:,.4g} TFLOP/s",
        f"Disk: {size(stored)} per checkpoint{' of all' if run.students else ''}; "
        f"{size(keep * stored)} for {keep}, of which one is being written",
        *([teacher] if teacher else []),
        f"Length: {steps_of(run, images):,} steps",
    ]
    if flags:
        lines += ["To train with it, pass:", *(f"  {flag}" for flag in flags)]
    return Text("\n".join(lines) + "\n")


def _said_of_times(load: Workload, machine: Machine) -> list[str]:
    """Says where the times come from, and how far off such times were."""
    if load.phases:
        return [
            "These times go by a step of this task that was timed on one device, and by measured",
            "  collectives (docs/scaling.md says how far off such times were)",
        ]
    if machine.rates.name.endswith("measured"):
        return ["These times go by measured rates of single operations, not by a step of this task"]
    return [
        "These times go by data sheets, are lower bounds, and were compared with no GPU; on CPU",
        "  ranks steps took 0.7 to 1.4 times as long as measured rates say. --probe measures",
    ]


def _teachers_share(run: Run, load: Workload, machine: Machine) -> str:
    """What the teacher costs, and when storing its maps would save it; empty without one."""
    counts, rate = load.counts[False], machine.rates.matmul
    teacher = counts.flops("inference", 1)
    rest = counts.flops("forward", 1) + counts.flops("backward", 1)
    if not run.frozen_models or not teacher:
        return ""
    most = largest_map_that_pays(teacher / rate, rest / rate, 1e9)
    return (
        f"Teacher: {100 * teacher / (teacher + rest):.0f} % of the FLOPs; stored maps (cache "
        f"{run.name} OUT --plan) save time\n  if a rank that reads 1 GB/s has maps of less than "
        f"{size(most)}, and each is learnt from several times"
    )


def _refused_table(bad: list[Refused], load: Workload, rows: int) -> Table:
    more = f", {rows} of {len(bad)}" if len(bad) > rows else ""
    table = _table(f"Settings that do not fit{more}")
    table.add_column("why")
    for one in bad[:rows]:
        table.add_row(
            _zero(one.candidate),
            _teacher(one.candidate, load),
            "blocks" if one.candidate.checkpointing else "off",
            one.reason,
        )
    return table


def _teacher(candidate: Candidate, load: Workload) -> str:
    """Where the teachers are, and how many of them, the largest, where some stay whole."""
    count = len(load.teachers)
    part = f" {count - candidate.whole}/{count}" if candidate.whole else ""
    return f"{candidate.teacher}{part}"


def _zero(candidate: Candidate) -> str:
    return f"{candidate.stage}{' + hpZ' if candidate.hpz else ''}"
