"""Tries the targets of a recipe before a start, builds them, and compares them at a resume.

A checkpoint's manifest records what decides the targets, and a resume compares it with the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.errors import CheckpointError
from fd_large.tasks.distillation import losses, target_statistics
from fd_large.tasks.distillation.grids import shapes_of
from fd_large.tasks.distillation.heads import registry
from fd_large.tasks.distillation.heads.map_head import WHERE as HEAD_WHERE
from fd_large.tasks.distillation.heads.map_head import MapShapes
from fd_large.tasks.distillation.normalisers import (
    BY_STATISTICS,
    WHITENING,
    Normaliser,
    check_normaliser,
    make_normaliser,
)
from fd_large.tasks.distillation.section import (
    MAP,
    SUMMARY,
    NamedTeacher,
    field_of,
    naming_target,
    source_flag,
)
from fd_large.tasks.distillation.target import NamedTarget


class Known(NamedTuple):
    """The tables of built-in losses and normalisers, by their names in a recipe.

    Attributes:
        losses: Losses by name.
        moving: Constructors of the normalisers whose statistics training updates, by name; each
            takes the number of channels. All other built-in normalisers are in normalisers.py.
    """

    losses: Mapping[str, Any] = losses.LOSSES
    moving: Mapping[str, Callable[[int], Normaliser]] = MappingProxyType({})

    def loss(self, name: str, **numbers: float) -> losses.Loss:
        """Returns the loss with the name `name`.

        Args:
            name: Name of the loss in a recipe.
            numbers: The arguments `beta` and `temperature` of `make_loss`.
        """
        return losses.make_loss(name, known=self.losses, **numbers)

    def loss_of(self, entry: NamedTeacher, kind: str) -> losses.Loss:
        """Returns the loss of a target.

        Args:
            entry: The entry in the recipe of the target's teacher.
            kind: "map" or "summary".
        """
        temperature = entry.setting("temperature", kind)
        return self.loss(entry.setting("loss", kind), beta=entry.beta, temperature=temperature)

    def normaliser(self, name: str, **options: Any) -> Normaliser:
        """Returns the normaliser with the name `name`.

        Args:
            name: Name of the normaliser in a recipe.
            options: Keyword arguments of `make_normaliser` except `running`.
        """
        return make_normaliser(name, running=self.moving, **options)


OF_THE_PAPER = Known()
"""The losses and normalisers of this folder."""

# The entries of a manifest for the files of statistics, by kind of target.
_STATISTICS = {MAP: "target_statistics", SUMMARY: "summary_target_statistics"}


def target_checks(
    name: str, entry: NamedTeacher, kind: str, known: Known
) -> Iterator[Callable[[], object]]:
    """Yields functions that try a target's loss and normaliser on a few tokens, and load its head.

    Each function raises ConfigError if its check fails. `check_fit` later checks the shapes of the
    head, when the models are known.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        kind: "map" or "summary".
        known: The losses and normalisers by name.
    """
    loss, normaliser, head, file = (
        entry.setting(field_name, kind)
        for field_name in ("loss", "normaliser", "head", "target_statistics")
    )

    def told(check: Callable[[], object]) -> None:
        with naming_target(name, kind):
            check()

    for check in (
        lambda: losses.check_loss(known.loss_of(entry, kind), loss),
        lambda: check_normaliser(
            known.normaliser(normaliser, eps=entry.whitening_eps, statistics=file), normaliser
        ),
        lambda: doors.load(head, kind="heads", where=HEAD_WHERE, built_in=registry.HEADS),
    ):
        yield partial(told, check)


def fields_not_read(name: str, entry: NamedTeacher, known: Known) -> list[str]:
    """Returns the names of a teacher's fields that no loss or normaliser of the teacher reads.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        known: The losses and normalisers by name.
    """
    of = partial(field_of, name)
    with naming_target(name):
        target_losses = {kind: known.loss_of(entry, kind) for kind in entry.targets}
    normalisers = {kind: entry.setting("normaliser", kind) for kind in entry.targets}
    ignored = []
    if not any(loss.reads_beta for loss in target_losses.values()):
        ignored.append(of("beta"))
    if not any(loss.reads_temperature for loss in target_losses.values()):
        ignored.append(of("temperature"))
    if name and not (SUMMARY in target_losses and target_losses[SUMMARY].reads_temperature):
        ignored.append(of("temperature", SUMMARY))
    if WHITENING not in normalisers.values():
        ignored.append(of("whitening_eps"))
    if normalisers.get(MAP) not in BY_STATISTICS:
        ignored.append(of("target_statistics"))
    if name and normalisers.get(SUMMARY) not in BY_STATISTICS:
        ignored.append(of("target_statistics", SUMMARY))
    return ignored


def statistics_file(entry: NamedTeacher, kind: str) -> str:
    """Returns the path of the file of statistics for a target's normaliser.

    The path is "" if the normaliser needs no file, or if the entry has no target of this kind.

    Args:
        entry: The teacher's entry in the recipe.
        kind: "map" or "summary".
    """
    if kind not in entry.targets or entry.setting("normaliser", kind) not in BY_STATISTICS:
        return ""
    return entry.setting("target_statistics", kind)


def check_statistics(
    target: NamedTarget, entry: NamedTeacher, facts: Callable[[], Mapping[str, Any]]
) -> None:
    """Checks that a target's file of statistics, if there is one, was measured on the target.

    Args:
        target: The target.
        entry: The entry in the recipe of the target's teacher.
        facts: Returns the `target_facts` of the run.

    Raises: ConfigError: if the file cannot be read, or if its facts differ from the run's facts.
    """
    if path := statistics_file(entry, target.kind):
        stored = target_statistics.read(path).facts
        with naming_target(target.teacher, target.kind):
            target_statistics.require_same(stored, facts(), path)


def make_target(
    width: int,
    teacher_width: int,
    *,
    teacher: str = "",
    kind: str = MAP,
    loss: str = "smooth_l1",
    normaliser: str = WHITENING,
    head: str = "linear",
    maps: Callable[[], MapShapes] | None = None,
    beta: float = 2.0,
    temperature: float = losses.Loss.temperature,
    whitening_eps: float = 1e-5,
    target_statistics: str = "",
    interpolation: str = "none",
    with_prefix: bool = True,
    weight: float = 1.0,
    projection: Tensor | None = None,
    known: Known = OF_THE_PAPER,
) -> NamedTarget:
    """Constructs a target from the names of its loss, normaliser and head.

    The head has random weights.

    Args:
        width: Number of channels of the student's map.
        teacher_width: Number of channels of the teacher's map or summary.
        teacher: The teacher's name, or "" for a single teacher.
        kind: "map" or "summary".
        loss: Name of the loss.
        normaliser: Name of the normaliser of the teacher's tokens.
        head: Name of the head that maps the student's tokens to the teacher's width (heads/).
        maps: Returns the shapes from which a `MapHead` is made; None if the head is no `MapHead`.
        beta: Difference above which the loss is linear rather than quadratic, in whitened units.
        temperature: Number by which losses on similarities divide cosines.
        whitening_eps: Constant that whitening adds to the variance of a teacher's token.
        target_statistics: Path of the file of statistics of the teacher's channels, for a
            normaliser that needs it.
        interpolation, with_prefix, weight, projection: As in `NamedTarget`.
        known: The losses and normalisers by name.

    Raises:
        ConfigError: if a name is unknown, or if the loss does not work on this kind of target or
            with this normaliser.
    """
    with naming_target(teacher, kind):
        head_module = registry.make(head, width, teacher_width, maps)
        made_loss = known.loss(loss, beta=beta, temperature=temperature)
        normalise = known.normaliser(
            normaliser, eps=whitening_eps, statistics=target_statistics, width=teacher_width
        )
    made_loss.begin(teacher, kind, width=teacher_width, normaliser=normaliser)
    return NamedTarget(
        head_module,
        teacher=teacher,
        normalise=normalise,
        loss=made_loss,
        weight=weight,
        kind=kind,
        fused_eps=whitening_eps if normaliser == WHITENING else None,
        interpolation=interpolation,
        with_prefix=with_prefix,
        projection=projection,
    )


def make_targets(
    student: nn.Module,
    teachers: Mapping[str, Any],
    entries: Mapping[str, NamedTeacher],
    *,
    image_size: int,
    width: int | None = None,
    known: Known = OF_THE_PAPER,
) -> list[NamedTarget]:
    """Constructs the targets of all teachers, with random weights in the heads.

    Args:
        student: The student.
        teachers: The teachers by name.
        entries: The recipe's entry of each teacher, by name, from `DistillationJob.settled`.
        image_size: Side of the student's images, in pixels; in a run with several sides, the side
            in evaluations.
        width: Number of channels of the heads' input; None for the student's channels.
        known: The losses and normalisers by name.

    Raises: FDError: if code of the user's own was not allowed.
    """
    doors.require_allowed(
        {
            field_of(name, slot, kind): entry.setting(slot, kind)
            for name, entry in entries.items()
            for kind in entry.targets
            for slot in ("head", "loss", "normaliser")
        }
    )
    return [
        make_target(
            width or student.width,
            entry.width_of(kind, teachers[name].width),
            teacher=name,
            kind=kind,
            loss=entry.setting("loss", kind),
            normaliser=entry.setting("normaliser", kind),
            head=entry.setting("head", kind),
            maps=partial(
                shapes_of,
                student,
                getattr(teachers[name], "module", teachers[name]),
                image_size,
                kind=kind,
                with_prefix=SUMMARY not in entry.targets,
            ),
            beta=entry.beta,
            temperature=entry.setting("temperature", kind),
            whitening_eps=entry.whitening_eps,
            target_statistics=entry.setting("target_statistics", kind),
            interpolation=entry.interpolation,
            with_prefix=SUMMARY not in entry.targets,
            weight=entry.weight_of(kind),
            projection=_projection(entry, kind, teachers[name]),
            known=known,
        )
        for name, entry in entries.items()
        for kind in entry.targets
    ]


def _projection(entry: NamedTeacher, kind: str, teacher: Any) -> Tensor | None:
    """Returns the matrix from a summary to its embedding, or None if the target is no embedding.

    The matrix is (embedding width, map width). If `teacher` holds no matrix, the
    result is uninitialised with this shape.

    Args:
        entry: The teacher's entry in the recipe.
        kind: "map" or "summary"; a map is no embedding.
        teacher: The teacher.
    """
    if kind != SUMMARY or not entry.embedding_width:
        return None
    projection: Tensor | None = getattr(teacher, "projection", None)
    return torch.empty(entry.embedding_width, teacher.width) if projection is None else projection


def target_facts(
    target: NamedTarget,
    student: nn.Module,
    teacher: Any,
    entry: NamedTeacher,
    *,
    image_size: int,
    teacher_image_size: int,
) -> dict[str, Any]:
    """Returns the settings and hashes, by name, that decide the tokens of a target.

    If they are equal in two runs, the target has the same tokens for the same images.

    Args:
        target: The target.
        student: The student.
        teacher: The target's teacher.
        entry: The teacher's entry in the recipe `DistillationJob.settled`.
        image_size: Side of the student's images, in pixels.
        teacher_image_size: Side of the teacher's images, in pixels. 0 stands for the side of the
            student's images or, for a teacher whose table of positions allows only one side, for
            this side.
    """
    facts: dict[str, Any] = {
        "teacher_hash": teacher.fingerprint,
        "layer": entry.layer,
        "image_size": image_size,
        "teacher_image_size": teacher_image_size,
    }
    if target.kind == SUMMARY:
        width = entry.width_of(SUMMARY, teacher.width)
        return {**facts, "kind": SUMMARY, "width": width}
    grid = student.grid(image_size, image_size)
    prefix = target.given(grid, student.num_prefix_tokens)[1]
    theirs = getattr(teacher, "module", teacher).grid(image_size)
    return {
        **facts,
        "interpolation": entry.interpolation,
        "grid": list(target.places(grid, theirs)),
        "prefix_tokens": 0 if SUMMARY in entry.targets else prefix,
        "width": teacher.width,
    }


def facts_of(entry: NamedTeacher, fingerprint: str, cache: Any | None) -> dict[str, Any]:
    """Returns what a manifest records of a teacher.

    This is the source of the weights, and the hashes of the weights, of stored maps and of files of
    statistics.

    Args:
        entry: The teacher's entry in the recipe.
        fingerprint: Hash of the teacher's weights.
        cache: Reader of the teacher's stored maps, or None if the teacher computes its maps.
    """
    facts = {"teacher_source": entry.source, "teacher_hash": fingerprint}
    if cache is not None:
        facts |= {"teacher_source": cache.header.teacher["source"]}
        facts |= {"cached_targets": f"{cache.header.digest}, {cache.header.precision}"}
    for kind, key in _STATISTICS.items():
        if path := statistics_file(entry, kind):
            facts[key] = target_statistics.read(path).digest
    return facts


def facts_by_teacher(manifest: Mapping[str, Any], *, several: bool) -> Mapping[str, Any]:
    """Returns what a manifest records of each teacher (`facts_of`), by the teacher's name.

    Args:
        manifest: Manifest of the checkpoint.
        several: Whether the run has several teachers. A single teacher is named "".
    """
    return manifest.get("teachers", {}) if several else {"": manifest}


def require_same_teachers(
    entries: Mapping[str, NamedTeacher],
    stored: Mapping[str, Any],
    ours: Callable[[str], Mapping[str, Any]],
) -> None:
    """Checks that the teachers are the same as when the run began.

    Args:
        entries: The recipe's entry of each teacher, by name.
        stored: What the manifest records of each teacher (`facts_of`), by name.
        ours: Returns what a manifest would record now of the teacher with the given name.

    Raises: CheckpointError: if the teachers differ; the message names the first difference.
    """
    if stored.keys() != entries.keys():
        raise CheckpointError(
            "teachers: not the teachers that this run began with; got "
            f"{', '.join(entries)}, expected {', '.join(stored) or 'one teacher'}. Name these "
            "teachers, or start over with --fresh."
        )
    for name, entry in entries.items():
        _require_same_teacher(name, entry, stored[name], ours(name))


def _require_same_teacher(
    name: str, entry: NamedTeacher, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Checks that a teacher, its stored maps and its statistics are the same as at the run's start.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        theirs: What the manifest records of the teacher (`facts_of`).
        ours: What a manifest would record of the teacher now.

    Raises: CheckpointError: if one of these differs; the message names the first difference.
    """
    for kind, key in _STATISTICS.items():
        if entry.setting("normaliser", kind) in BY_STATISTICS and (
            theirs.get(key) != ours.get(key)
        ):
            raise CheckpointError(
                f"{field_of(name, 'target_statistics', kind)}: not the file that this "
                f"run began with; got hash {ours.get(key)}, expected {theirs.get(key)}. Set that "
                "file, or start over with --fresh."
            )
    if theirs.get("cached_targets") != ours.get("cached_targets"):
        raise CheckpointError(
            f"{source_flag(name).removeprefix('--')}: not the cached targets that this run "
            f"began with; got {ours.get('cached_targets')}, expected "
            f"{theirs.get('cached_targets')}. Name these cached targets, or start over with "
            "--fresh."
        )
    if theirs.get("teacher_hash") != ours["teacher_hash"]:
        raise CheckpointError(
            f"{source_flag(name).removeprefix('--')}: not the teacher that this run began "
            f"with; got hash {ours['teacher_hash']}, expected "
            f"{theirs.get('teacher_hash')} ({theirs.get('teacher_source')}). Name that teacher, "
            "or start over with --fresh."
        )
