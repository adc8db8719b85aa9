"""Teachers before they are built: their names in messages, and how their grids meet others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from fd_large.backbones.registry import family_of, own_image_size
from fd_large.engine.frozen import Frozen, frozen_maker
from fd_large.engine.student import make_student
from fd_large.errors import FDError, ShapeError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import require
from fd_large.recipes.sections import AUTO, Student
from fd_large.tasks.distillation.alignment import Grid, teacher_side
from fd_large.tasks.distillation.section import NamedTeacher


def source_flag(name: str) -> str:
    """Returns the flag of a teacher's source."""
    return f"--teachers.{name}.source" if name else "--teacher.source"


def called(name: str) -> str:
    """What a teacher is called in messages."""
    return f"teacher {name}" if name else "teacher"


def teacher_maker(name: str, entry: NamedTeacher, image_size: int) -> Callable[[], Frozen]:
    """Returns a constructor of a teacher with random weights, for images of that side.

    Raises: ConfigError: if the model is still `auto`; the weights decide it, once opened.
    """
    where = source_flag(name)
    require(
        entry.model != AUTO and entry.teacher_image_size != AUTO,
        f"{where.removesuffix('.source')}.model: auto means the model that the weights belong to",
        f"{where} {entry.source!r}",
        "opened weights",
        f"Set {where}, or name a model",
    )
    return frozen_maker(
        entry,
        image_size=image_size,
        own_image_size=entry.teacher_image_size,
        residual_dtype=entry.residual_dtype,
        before_norm=entry.layer == "before_norm",
    )


def grid_of(whose: str, of_side: Callable[[int, int], Grid], side: int) -> Grid:
    """Returns the grid of a model's map.

    Raises: ShapeError: naming the model, if it takes no images of that side.
    """
    try:
        return of_side(side, side)
    except ShapeError as error:
        raise ShapeError(f"{whose}: {error}") from None


def with_grid(
    name: str, entry: NamedTeacher, student: Student, *, image_size: int, follows: bool
) -> NamedTeacher:
    """Returns a teacher's entry with numbers where it says auto: the size of its images, its grid.

    Args:
        name: The teacher's name; "" for an only one.
        entry: Its entry, the model settled.
        student: The student's section, settled.
        image_size: Side of the student's images, in pixels.
        follows: Whether positions may be resized to the teacher's images.
    """
    size = image_size
    is_automatic = AUTO in (entry.interpolation, entry.teacher_image_size)
    if not is_automatic or entry.model == AUTO:
        return entry
    architecture = resolve(entry.model, entry.architecture)
    follows = follows and family_of(architecture).resizes(architecture)
    with torch.device("meta"):
        net = make_student(student, image_size=size)
    wanted = grid_of("student", net.grid, size)

    def at(side: int) -> tuple[Grid | None, NamedTeacher]:
        """The teacher's grid for images of a side, 0 as in `frozen_maker`; and its entry."""
        resized = replace(entry, architecture=replace(entry.architecture, image_size=side))
        for model in (entry, resized) if follows and side else (entry,):
            # What is wrong at any size is told by the first call.
            with torch.device("meta"), suppress(FDError if side else ShapeError):
                make = teacher_maker(name, replace(model, teacher_image_size=side), size)
                return make().grid(size), model
        return None, entry

    side = entry.teacher_image_size
    if side == AUTO:
        side, as_it_is = 0, at(0)[0]
        given = as_it_is and entry.interpolation == "bilinear"
        if as_it_is != wanted and not given:
            side = teacher_side(
                wanted,
                lambda side: at(side)[0],
                image_size=size,
                own_size=own_image_size(entry.model, architecture),
            )
    grid, met = at(side)
    interpolation = entry.interpolation
    if interpolation == AUTO:
        interpolation = "none" if grid in (wanted, None) else "bilinear"
    return replace(met, teacher_image_size=side, interpolation=interpolation)
