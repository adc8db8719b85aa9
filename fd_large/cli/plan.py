"""The command `fd-large plan`, which estimates memory, speed and duration of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fd_large.cli.arguments import AllowsCode, TakesRunFile, parse_with_recipe
from fd_large.cli.output import tables
from fd_large.cli.paths import paths_of, require_paths
from fd_large.cli.plan_report import report
from fd_large.cli.plan_workload import Kernels, shape_fields, shared_step_bytes, workload
from fd_large.errors import ConfigError, check_all
from fd_large.files import check_out, unusable
from fd_large.plan import kept_counts
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.counts import NOTHING
from fd_large.plan.phases import Phases
from fd_large.plan.phases import read as read_phases
from fd_large.plan.rates import Rates, rates_of
from fd_large.plan.search import Refused, search
from fd_large.plan.step_time import Estimate
from fd_large.plan.workload import Workload, together
from fd_large.recipes import dataset_sizes, registry
from fd_large.recipes.architectures import brings_model
from fd_large.recipes.fields import at_least, flat, plain, positive, require
from fd_large.recipes.run import Run
from fd_large.recipes.sections import AUTO, RANDOM, FrozenModel

NARROW = 104
"""Width in characters below which the table omits columns that the lines after it repeat."""


@dataclass(frozen=True, kw_only=True)
class Plan(TakesRunFile, AllowsCode):
    """Plan a recipe on a cluster: memory, time, network, disk; from shapes, without a GPU.

    Fields of the recipe (--batch.global_batch_size 8192 ...) are flags, as in training.
    """

    # Name of the recipe that is planned. If it is left out: quickstart.
    recipe: str = registry.DEFAULT_RECIPE
    # Number of ranks, one for each GPU.
    gpus: int = 8
    # GPU model: h100, h200, b200, a100, a100_40 or l40s.
    gpu: str = "h100"
    # Number of GPUs in each node.
    gpus_per_node: int = 8
    # Rate of each network card in Gb/s.
    network: float = 400.0
    # Number of network cards in each node. 0: one for each GPU.
    nics_per_node: int = 0
    # Number of images of the dataset, which decides the number of steps of an epoch. The default is
    # the number in ImageNet-1K.
    images: int = dataset_sizes.IMAGENET
    # Kernels whose speed is assumed. fused: the fused kernels, on GPUs that have them (h100, h200,
    # a100, a100_40). reference: plain torch.
    kernels: Kernels = "fused"
    # JSON file of measured rates, which replace the rates of --gpu. With --probe, this file is
    # written. Empty: the rates of --gpu.
    rates: str = ""
    # Measure the rates of this machine first: of its GPU, or, without a GPU, of as many CPU ranks
    # as --gpus says.
    probe: bool = False
    # File to which the DeepSpeed JSON of the first setting is written. Empty: it is not written.
    write: str = ""
    # Number of settings that are shown, 1 or more.
    rows: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        rates_of(self.gpu)
        at_least("--gpus", self.gpus, 1, "ranks")
        at_least("--gpus_per_node", self.gpus_per_node, 1, "ranks")
        at_least("--nics_per_node", self.nics_per_node, 0, "network cards")
        at_least("--images", self.images, 1, "images")
        at_least("--rows", self.rows, 1, "settings")
        positive("--network", self.network)
        require(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            "--gpus: the last node would be partly used",
            f"{self.gpus} GPUs in nodes of {self.gpus_per_node}",
            f"a multiple of {self.gpus_per_node}",
            "Change --gpus, or set --gpus_per_node",
        )


def main(arguments: list[str]) -> int:
    """Plans a run, prints the report and writes the requested files; returns the exit code."""
    parsed = parse_with_recipe(Plan, arguments, command="plan", recipe=registry.DEFAULT_RECIPE)
    options = parsed.own
    for flag, file in (
        ("--write", options.write),
        ("--rates", options.rates if options.probe else ""),
    ):
        if file:
            check_out(file, where=flag, holds="file")
    cluster = Cluster(
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        nic_gigabits=options.network,
        nics_per_node=options.nics_per_node or options.gpus_per_node,
    )
    run = _with_students_of_weights(parsed.run)
    load, machine, good, bad = plan(
        run,
        cluster,
        gpu=options.gpu,
        rates=options.rates,
        probe=options.probe,
        kernels=options.kernels,
    )
    console = tables()
    narrow = console.width < NARROW
    console.print(
        report(
            run, load, machine, good, bad, images=options.images, rows=options.rows, narrow=narrow
        )
    )
    if options.write:
        if not good:
            raise ConfigError(
                "--write: no setting fits; got no settings to write, expected at least one. Use "
                "more GPUs."
            )
        _write("--write", options.write, good[0].candidate.deepspeed())
        console.print(
            f"wrote the JSON of the first setting; to use it: --deepspeed_config {options.write}",
            soft_wrap=True,
        )
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
    """Estimates time and memory of a run on a cluster for many settings, and sorts the settings.

    `Plan` describes the arguments after `cluster`.

    Returns: the workload, the machine, the settings that fit with the best one first, and the
        settings that do not fit.

    Raises: FDError: if the run cannot be planned, or the file of rates cannot be read.
    """
    runs = [as_counted(student) for student in run.each_student().values()]
    phases: list[Phases | None] = [None] * len(runs)
    if probe:
        # This imports torch, which the rest of this command does not need.
        from fd_large.cli.plan_probe import probe as measure

        measured, phases = measure([_as_trained(student) for student in runs], ranks=cluster.gpus)
        if rates:
            timed = {
                _phases_key(run, measured): step_phases.to_plain()
                for run, step_phases in zip(runs, phases, strict=True)
                if step_phases
            }
            _write("--rates", rates, measured.to_dict() | {"phases": timed})
    else:
        measured = rates_of(gpu, rates)
        if rates:
            phases = [read_phases(rates, _phases_key(run, measured)) for run in runs]
    machine = Machine(cluster=cluster, rates=measured)
    shared = NOTHING
    if len(runs) > 1:
        shared = shared_step_bytes(_as_trained(runs[0]), measured, kernels)
    loads = [
        replace(workload(run, measured, kernels), phases=timed)
        for run, timed in zip(runs, phases, strict=True)
    ]
    load = together(loads, shared)
    return load, machine, *search(load, machine)


def _with_students_of_weights(run: Run) -> Run:
    """Returns the run with each student's model completed from the weights of its `init` field.

    Training completes the model in the same way.

    Raises: FDError: if weights are missing, or belong to another model.
    """
    named = {field: path for field, path in paths_of(run).items() if field.endswith(".init")}
    if not any(named.values()):
        return run
    require_paths(named)
    # These imports load torch, which a run from random weights does not need.
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.jobs import job_of
    from fd_large.weights.settle import settle_student

    sources = sources_of(job_of)
    students = (run.student, *run.students.values())
    settled, *others = check_all(*(partial(settle_student, s, sources) for s in students))
    return replace(run, student=settled, students=dict(zip(run.students, others, strict=True)))


def _phases_key(run: Run, rates: Rates) -> str:
    """Returns the key under which a file of rates stores the times of the phases of a run's step.

    The key is made from all fields of the recipe that decide these times.
    """
    fields = {name: plain(flat(run)[name]) for name in ("optim.name", "engine.compile")}
    return kept_counts.key(shape_fields(run) | fields, rates.name, "phases")


def _of_record(run: Run) -> Mapping[str, FrozenModel] | None:
    """Returns the frozen models (teachers) of the published recipe with the name of `run`.

    The result is {section of the recipe: frozen model}, or None if no recipe has this name.
    """
    return registry.get(run.name).frozen_models if run.name in registry.RECIPES else None


def as_counted(run: Run) -> Run:
    """Returns the run with which `plan` counts a step: with the models of all teachers known.

    A run with the published teachers of its recipe is returned unchanged, since its counts are
    stored under the names in that recipe. In other runs, a teacher without a named model gets the
    model that its weights show, as in training.
    """
    return run if run.frozen_models == _of_record(run) else _as_trained(run)


def _as_trained(run: Run) -> Run:
    """Returns `run`, in which a teacher without a named model has the model that its weights show.

    Training finds the model in the same way. A run whose recipe names the models of all teachers
    is returned unchanged.
    """
    from_source = {
        name: section
        for name, section in run.frozen_models.items()
        if brings_model(section.source) or section.model == AUTO
    }
    if not from_source:
        return run
    # These imports load torch, which a published recipe does not need.
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.jobs import job_of

    for name, section in from_source.items():
        require(
            section.model != AUTO or section.source not in ("", RANDOM),
            f"{name}.model: auto takes the model from the weights, and there are none",
            f"{name}.source {section.source!r}",
            "a source of weights",
            f"Set --{name}.source, or --{name}.model to the name of a model",
        )
    # The student's weights change no shape.
    untrained = replace(run, student=replace(run.student, init=""))
    return replace(job_of(untrained).settle(sources_of(job_of)), student=run.student)


def _write(flag: str, name: str, content: dict[str, Any]) -> None:
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise unusable(flag, error, path) from None
