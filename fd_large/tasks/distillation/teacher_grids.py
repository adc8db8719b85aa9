"""Teachers before they are built: their names in messages, and how their grids meet others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import nn

from fd_large.backbones.registry import family_of, own_image_size
from fd_large.engine.frozen import Frozen, frozen_maker
from fd_large.engine.student import make_student
from fd_large.errors import FDError, ShapeError
from fd_large.recipes.architectures import image_side_of, resolve
from fd_large.recipes.fields import require
from fd_large.recipes.sections import AUTO, Student
from fd_large.tasks.distillation.alignment import Grid, teacher_side
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.several.mosaic import Mosaic


def source_flag(name: str) -> str:
    """Returns the flag of a teacher's source."""
    return f"--teachers.{name}.source" if name else "--teacher.source"


def called(name: str) -> str:
    """What a teacher is called in messages."""
    return f"teacher {name}" if name else "teacher"


def teacher_maker(
    name: str,
    entry: NamedTeacher,
    image_size: int,
    *,
    sides: Mapping[int, int] = MappingProxyType({}),
) -> Callable[[], Frozen]:
    """Returns a constructor of a teacher with random weights.

    Args:
        name: The teacher's name; "" for an only one.
        entry: Its entry.
        image_size: Side of the student's images, in pixels; of several, that of evaluations.
        sides: Side of the teacher's images for each of several of the student's.

    Raises: ConfigError: if the model is still `auto`; the weights decide it, once opened.
    """
    where = source_flag(name)
    side = sides.get(image_size, entry.teacher_image_size)
    require(
        entry.model != AUTO and side != AUTO,
        f"{where.removesuffix('.source')}.model: auto means the model that the weights belong to",
        f"{where} {entry.source!r}",
        "opened weights",
        f"Set {where}, or name a model",
    )
    assert isinstance(side, int)
    make = frozen_maker(
        entry,
        image_size=image_size,
        own_image_size=side,
        sides=sides,
        residual_dtype=entry.residual_dtype,
        before_norm=entry.layer == "before_norm",
    )
    if not entry.mosaic:
        return make

    def tiled() -> Frozen:
        frozen = make()
        return Mosaic(frozen.net, frozen.statistics, image_size=side, tiles=entry.mosaic)

    return tiled


def grid_of(whose: str, of_side: Callable[[int, int], Grid], side: int) -> Grid:
    """Returns the grid of a model's map.

    Raises: ShapeError: naming the model, if it takes no images of that side.
    """
    try:
        return of_side(side, side)
    except ShapeError as error:
        raise ShapeError(f"{whose}: {error}") from None


def grid_of_student(net: nn.Module, side: int, *, several: bool) -> Grid:
    """Returns the grid of the student's map, on the meta device.

    Args:
        net: The student.
        side: Side of its images, in pixels.
        several: Whether that is one of several sizes.

    Raises: ShapeError: if it takes no images of that side.
    """
    try:
        grid = grid_of("student", net.grid, side)
        if several:  # Some models find out in their forward only.
            net(torch.empty(1, 3, side, side, device="meta"))
    except ShapeError as error:
        if not several:
            raise
        raise ShapeError(f"data.image_sizes: {side}: {error}") from None
    return grid


def with_grid(
    name: str,
    entry: NamedTeacher,
    student: Student,
    *,
    image_size: int,
    sides: Sequence[int] = (),
    follows: bool,
) -> NamedTeacher:
    """Returns a teacher's entry with numbers where it says auto: the size of its images, its grid.

    Where the student's images have several sizes, and the teacher's go with them, its size stays
    auto: `sides_of` says what that comes to.

    Args:
        name: The teacher's name; "" for an only one.
        entry: Its entry, the model settled.
        student: The student's section, settled.
        image_size: Side of the student's images, in pixels; of several, that of evaluations.
        sides: All sides of the student's images; none: `image_size` alone.
        follows: Whether positions may be resized to the teacher's images.
    """
    is_automatic = AUTO in (entry.interpolation, entry.teacher_image_size)
    if not is_automatic or entry.model == AUTO:
        return entry
    architecture = resolve(entry.model, entry.architecture)
    if entry.mosaic and entry.teacher_image_size in (0, AUTO):
        # The mosaic has the size that the teacher was trained at.
        own = architecture.fixed_image_size or own_image_size(entry.model, architecture)
        require(
            bool(own),
            f"teachers.{name}.mosaic: the size of the mosaic is not known",
            f"{entry.mosaic} with teacher_image_size {entry.teacher_image_size}",
            "pixels",
            f"Set --teachers.{name}.teacher_image_size",
        )
        entry = replace(entry, teacher_image_size=own)
    follows = follows and family_of(architecture).resizes(architecture)
    several = tuple(sides) if set(sides) - {image_size} else ()
    wanted = _grids_of_student(student, image_size, several)
    side, grid, met = _meeting(
        name, entry, wanted[image_size], image_size=image_size, follows=follows
    )
    agree = grid in (wanted[image_size], None)
    if several:
        met = replace(met, teacher_image_size=entry.teacher_image_size)
        found = {size: _seen(name, met, wanted[size], image_size=size) for size in several}
        agree = all(grid in (wanted[size], None) for size, (_, grid) in found.items())
        if entry.teacher_image_size == AUTO:
            seen = {size: side for size, (side, _) in found.items()}
            same = set(seen.values())
            side = same.pop() if len(same) == 1 else AUTO
            if all(size == own for size, own in seen.items()):
                side = 0
    interpolation = entry.interpolation
    if interpolation == AUTO:
        interpolation = "none" if agree else "bilinear"
    return replace(met, teacher_image_size=side, interpolation=interpolation)


def sides_of(
    name: str, entry: NamedTeacher, student: Student, *, image_size: int, sides: Sequence[int]
) -> dict[int, int]:
    """Returns the side of a teacher's images for each of several sides of the student's.

    Args:
        name: The teacher's name; "" for an only one.
        entry: What `with_grid` gave.
        student, image_size, sides: As there.
    """
    if entry.teacher_image_size != AUTO:
        section = asdict(entry)
        return {size: image_side_of(section, size) for size in sides}
    wanted = _grids_of_student(student, image_size, sides)
    return {size: _seen(name, entry, wanted[size], image_size=size)[0] for size in sides}


def _grids_of_student(student: Student, image_size: int, sides: Sequence[int]) -> dict[int, Grid]:
    """The student's grid at each side of its images."""
    with torch.device("meta"):
        net = make_student(student, image_size=image_size, resizes_positions=bool(sides))
    every = sides or [image_size]
    return {side: grid_of_student(net, side, several=bool(sides)) for side in every}


def _seen(
    name: str, entry: NamedTeacher, wanted: Grid, *, image_size: int
) -> tuple[int, Grid | None]:
    """The side of a teacher's images for one side of the student's, and its grid there."""
    side, grid, _ = _meeting(name, entry, wanted, image_size=image_size, follows=False)
    seen = asdict(replace(entry, teacher_image_size=side))
    return image_side_of(seen, image_size), grid


def _meeting(
    name: str, entry: NamedTeacher, wanted: Grid, *, image_size: int, follows: bool
) -> tuple[int, Grid | None, NamedTeacher]:
    """How a teacher sees the student's images.

    Args:
        name, entry, follows: See `with_grid`.
        wanted: The student's grid.
        image_size: Side of the student's images.

    Returns: the side of the teacher's images, 0 as in `frozen_maker`; its grid, None if it takes no
        such images; and its entry, positions made for them.
    """

    @cache  # The side that is chosen has been tried.
    def at(side: int) -> tuple[Grid | None, NamedTeacher]:
        """The teacher's grid for images of a side, 0 as in `frozen_maker`; and its entry."""
        resized = replace(entry, architecture=replace(entry.architecture, image_size=side))
        for model in (entry, resized) if follows and side else (entry,):
            # What is wrong at any size is told by the first call.
            with torch.device("meta"), suppress(FDError if side else ShapeError):
                make = teacher_maker(name, replace(model, teacher_image_size=side), image_size)
                return make().grid(image_size), model
        return None, entry

    side = entry.teacher_image_size
    if side == AUTO:
        side, as_it_is = 0, at(0)[0]
        given = as_it_is and entry.interpolation == "bilinear"
        if as_it_is != wanted and not given:
            side = teacher_side(
                wanted,
                lambda side: at(side)[0],
                image_size=image_size,
                own_size=own_image_size(entry.model, resolve(entry.model, entry.architecture)),
            )
    return side, *at(side)
