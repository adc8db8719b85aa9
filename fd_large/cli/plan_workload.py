"""Counts the FLOPs and bytes of a run's step for `plan`, or takes stored counts."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from fd_large.plan import kept_counts
from fd_large.plan.counts import Counts, Line, of_sizes
from fd_large.plan.rates import CARDS, Rates
from fd_large.plan.search import num_steps
from fd_large.plan.workload import Workload, frozen_in_bfloat16
from fd_large.recipes.fields import flat, plain
from fd_large.recipes.run import Run
from fd_large.recipes.sections import ADAMW, AUTO, Student
from fd_large.tasks.distillation.section import cached_folder

if TYPE_CHECKING:
    from fd_large.kernels.choose import Device

Kernels = Literal["fused", "reference"]
"""fused: the fused kernels, on cards that have them; reference: plain torch."""

SHAPES = (
    *("student.", "teacher.", "teachers.", "objective.", "weighting.rule", "mask.", "task."),
    "data.image_size",
)
"""Prefixes of the recipe's fields that may change a step's computation, except `NO_SHAPES`."""
NO_SHAPES = (
    *(f"student.{name}" for name in ("init", "init_allow", "initialization")),
    "student.activation_checkpointing",
    *(
        f"{teacher}.{name}"
        for teacher in ("teacher", "teachers.*")
        for name in ("allow", "placement", "source", "statistics")
    ),
    "objective.temperature",
    "teachers.*.datasets",
    "teachers.*.summary.temperature",
    "teachers.*.temperature",
    "teachers.*.weight",
    "task.distillation.*",
)


def workload(run: Run, rates: Rates = CARDS["h100"], kernels: Kernels = "fused") -> Workload:
    """Returns the workload of a run on a card: FLOPs and bytes of a step, and facts on its batch.

    The FLOPs and bytes are those that the package has stored for this run and card, if there are
    any. Otherwise a step is counted, which takes seconds.

    Raises: FDError: if the run's models cannot be built.
    """
    return Workload(
        counts=counts_kept_of(run, rates, kernels) or count_anew(run, rates, kernels),
        global_batch_size=run.batch.global_batch_size,
        frozen_dtype=run.frozen_dtype,
        moments=_moments(run),
        may_split_frozen=bool(run.frozen_models),
        norm_group=_norm_group(run),
    )


def counts_kept_of(run: Run, rates: Rates, kernels: Kernels) -> dict[bool, Counts] | None:
    """Returns the counts of a step that the package has stored for a run and a card, or None.

    The keys are as in `count_anew`. Nothing is stored for CPUs, for GPUs without bfloat16 and for
    runs that read a teacher's stored maps.
    """
    # Shipped counts include the teachers, which a run with cached targets does not compute.
    if not rates.overlap or not rates.bfloat16 or cached_folders(run):
        return None
    return kept_counts.read(kept_counts.key(shape_fields(run), rates.capability, kernels))


def _norm_group(run: Run) -> int:
    """Returns how many images share the statistics of the student's batch norms; 1 without any."""
    if not run.student_architecture().has_batch_norms:
        return 1
    # These imports load torch, which a published recipe does not need.
    from fd_large.engine.student import check_norm_batch
    from fd_large.tasks.jobs import job_of

    group, side = job_of(run).norm_group(), min(run.data.sides)
    batch = replace(run.batch, micro_batch_size="auto")  # The plan chooses it.
    return check_norm_batch(run.student, group, batch, image_size=side, world_size=1) or 1


def _moments(run: Run) -> int:
    """Returns how many values of state the optimiser keeps for each parameter; for AdamW 2."""
    if run.optim.name == ADAMW:
        return 2
    # This import loads torch, which a published recipe does not need.
    from fd_large.engine.zero.optimizer import moments_of

    return len(moments_of(run.optim))


def count_anew(run: Run, rates: Rates, kernels: Kernels) -> dict[bool, Counts]:
    """Counts the FLOPs and bytes of a step of a run on a card, which takes seconds.

    Returns: the counts without activation checkpointing (False) and with it (True).

    Raises: FDError: if the run's models cannot be built.
    """
    # These imports load torch, which a published recipe does not need.
    from fd_large.engine.counting.count import count
    from fd_large.tasks.jobs import job_of

    each = [
        count(
            job_of(run),
            _device(rates, kernels),
            bfloat16=rates.bfloat16,
            frozen_bfloat16=frozen_in_bfloat16(run.frozen_dtype, rates.bfloat16),
            micro_batch_size=run.batch.micro_batch_size,
            image_size=side,
        )
        for side in sorted(run.data.image_sizes) or (0,)
    ]
    return {wrapped: of_sizes([counts[wrapped] for counts in each]) for wrapped in each[0]}


def shared_step_bytes(run: Run, rates: Rates, kernels: Kernels) -> Line:
    """Returns the bytes, as a linear function of the images, that a run's students use in common.

    These are the bytes of a micro-batch's images and of the outputs of the frozen models
    (teachers), which are in memory once for all students of `run`, which has several.
    """
    from fd_large.engine.counting.count import shared_bytes
    from fd_large.tasks.jobs import job_of

    half = frozen_in_bfloat16(run.frozen_dtype, rates.bfloat16)
    return shared_bytes(job_of(run), _device(rates, kernels), frozen_bfloat16=half)


def _device(rates: Rates, kernels: Kernels) -> Device:
    """Returns the card as the `Device` for which kernels are chosen."""
    from fd_large.kernels.choose import Device

    major, _, minor = rates.capability.partition(".")
    return Device(
        (int(major), int(minor)) if rates.capability else None,
        on_gpu=rates.overlap,
        wish="auto" if kernels == "fused" else "reference",
    )


def shape_fields(run: Run) -> dict[str, Any]:
    """Returns the recipe's fields that may affect a step's computation and are not defaults.

    Fields that are `auto` or unset are left out, since they follow from other fields.
    """
    default = flat(Run(name=run.name, student=Student(model=run.student.model)))
    default.pop("student.model")
    fields = {name: plain(value) for name, value in flat(run).items() if name.startswith(SHAPES)}
    return {
        name: value
        for name, value in fields.items()
        if not any(fnmatchcase(name, pattern) for pattern in NO_SHAPES)
        and value not in (None, AUTO, plain(default.get(name, "")))
    }


def cached_folders(run: Run) -> dict[str, str]:
    """Returns {section of a teacher: folder} for the teachers whose stored maps a run reads.

    Teachers that are run are left out.
    """
    folders = {name: cached_folder(model.source) for name, model in run.frozen_models.items()}
    return {name: folder for name, folder in folders.items() if folder}


def steps_of(run: Run, images: int) -> int:
    """Returns the number of steps of a run on a dataset with `images` images.

    This is `optim.max_steps`, or if that is 0 the steps of `optim.epochs` epochs.
    """
    optim = run.optim
    return optim.max_steps or num_steps(optim.epochs, images, run.batch.global_batch_size)
