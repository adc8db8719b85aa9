"""The targets that a recipe describes: tried before a start, constructed, and told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.engine.frozen import Frozen
from fd_large.tasks.distillation.cache_recorder import Recorder
from fd_large.tasks.distillation.cached_teacher import CachedTeacher
from fd_large.tasks.distillation.heads.map_head import WHERE as HEAD_WHERE
from fd_large.tasks.distillation.heads.registry import HEADS
from fd_large.tasks.distillation.losses import check_loss, make_loss
from fd_large.tasks.distillation.model_fit import maps_of
from fd_large.tasks.distillation.normalisers import (
    BY_STATISTICS,
    WHITENING,
    check_normaliser,
    make_normaliser,
)
from fd_large.tasks.distillation.section import MAP, SUMMARY, NamedTeacher, field_of, naming_target
from fd_large.tasks.distillation.target import Target
from fd_large.tasks.distillation.teacher import PlacedTeacher

AnyTeacher = Frozen | PlacedTeacher | CachedTeacher | Recorder
"""A teacher on shapes alone, one that is built, and what stands in the place of one."""


def checks(name: str, entry: NamedTeacher, kind: str) -> Iterator[Callable[[], object]]:
    """Yields what tries loss and normaliser of a target on a few tokens, and finds its head.

    The head's shapes wait for the models.

    Args:
        name: The teacher's name; "" for an only one.
        entry: What the recipe says of it.
        kind: "map" or "summary".
    """
    loss, normaliser, head, file = (
        entry.setting(one, kind) for one in ("loss", "normaliser", "head", "target_statistics")
    )

    def told(check: Callable[[], object]) -> None:
        with naming_target(name, kind):
            check()

    for check in (
        lambda: check_loss(make_loss(loss, beta=entry.beta), loss),
        lambda: check_normaliser(
            make_normaliser(normaliser, eps=entry.whitening_eps, statistics=file), normaliser
        ),
        lambda: doors.load(head, kind="heads", where=HEAD_WHERE, built_in=HEADS),
    ):
        yield partial(told, check)


def ignored_fields(name: str, entry: NamedTeacher) -> list[str]:
    """Returns the fields of a teacher's targets that its losses and normalisers do not read.

    Args:
        name: The teacher's name; "" for an only one.
        entry: What the recipe says of it.
    """
    of = partial(field_of, name)
    with naming_target(name):
        losses = [make_loss(entry.setting("loss", kind), beta=entry.beta) for kind in entry.targets]
    normalisers = {kind: entry.setting("normaliser", kind) for kind in entry.targets}
    ignored = []
    if not any(loss.reads_beta for loss in losses):
        ignored.append(of("beta"))
    if WHITENING not in normalisers.values():
        ignored.append(of("whitening_eps"))
    if normalisers.get(MAP) not in BY_STATISTICS:
        ignored.append(of("target_statistics"))
    if name and normalisers.get(SUMMARY) not in BY_STATISTICS:
        ignored.append(of("target_statistics", SUMMARY))
    return ignored


def statistics_file(entry: NamedTeacher, kind: str) -> str:
    """Returns the file of statistics that a target is normalised by; empty where it needs none."""
    if kind not in entry.targets or entry.setting("normaliser", kind) not in BY_STATISTICS:
        return ""
    return entry.setting("target_statistics", kind)


def make_targets(
    student: nn.Module,
    teachers: Mapping[str, AnyTeacher],
    entries: Mapping[str, NamedTeacher],
    *,
    image_size: int,
) -> list[Target]:
    """Constructs the targets of all teachers, their heads with random weights.

    Args:
        student: The student.
        teachers: The teachers by name.
        entries: What the settled recipe says of each.
        image_size: Side of the student's images, in pixels; of several, that of evaluations.

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
        Target(
            student.width,
            entry.width_of(kind, teachers[name].width),
            teacher=name,
            kind=kind,
            loss=entry.setting("loss", kind),
            normaliser=entry.setting("normaliser", kind),
            head=entry.setting("head", kind),
            maps=partial(
                maps_of,
                student,
                getattr(teachers[name], "module", teachers[name]),
                image_size,
                kind=kind,
                with_prefix=SUMMARY not in entry.targets,
            ),
            beta=entry.beta,
            whitening_eps=entry.whitening_eps,
            target_statistics=entry.setting("target_statistics", kind),
            interpolation=entry.interpolation,
            with_prefix=SUMMARY not in entry.targets,
            weight=entry.weight_of(kind),
            projection=_projection(entry, kind, teachers[name]),
        )
        for name, entry in entries.items()
        for kind in entry.targets
    ]


def _projection(entry: NamedTeacher, kind: str, teacher: Any) -> Tensor | None:
    """The projection of a placed teacher's summary; of others one of the same shape."""
    if kind != SUMMARY or not entry.embedding_width:
        return None
    held: Tensor | None = getattr(teacher, "projection", None)
    return torch.empty(entry.embedding_width, teacher.width) if held is None else held


def target_facts(
    target: Target,
    student: nn.Module,
    teacher: PlacedTeacher | CachedTeacher,
    entry: NamedTeacher,
    *,
    image_size: int,
    teacher_image_size: int,
) -> dict[str, Any]:
    """Returns what decides the tokens that are learnt, besides the images.

    Args:
        target: The target.
        student: The student.
        teacher: The target's teacher.
        entry: What the settled recipe says of it.
        image_size: Side of the student's images, in pixels.
        teacher_image_size: Side of the teacher's images, 0 as in `frozen_maker`.
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
