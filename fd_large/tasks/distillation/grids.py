"""How the maps of student and teachers meet: sides of images, grids, and whether heads fit them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import nn

from fd_large.backbones.custom.custom import check_map
from fd_large.backbones.registry import family_of, own_image_size
from fd_large.engine.frozen import Frozen, frozen_maker
from fd_large.engine.heads import check_head
from fd_large.engine.student import make_student
from fd_large.errors import ConfigError, FDError, ShapeError
from fd_large.recipes.architectures import image_side_of, resolve
from fd_large.recipes.fields import require
from fd_large.recipes.sections import AUTO, Student
from fd_large.tasks.distillation.alignment import Grid, teacher_side
from fd_large.tasks.distillation.heads.map_head import WHERE as HEAD_WHERE
from fd_large.tasks.distillation.heads.map_head import MapHead, Maps, check_map_head, with_blocks
from fd_large.tasks.distillation.section import (
    MAP,
    SUMMARY,
    NamedTeacher,
    called,
    naming_target,
    source_flag,
)
from fd_large.tasks.distillation.several.mosaic import Mosaic
from fd_large.tasks.distillation.target import NamedTarget, as_map, summary
from fd_large.tasks.distillation.task import Distillation

log = logging.getLogger(__name__)


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


def check_fit(
    task: Distillation,
    teachers: Mapping[str, Frozen],
    entries: Mapping[str, NamedTeacher],
    size: int,
    *,
    image_size: int,
    sizes: Sequence[int],
) -> None:
    """Refuses models and heads that do not take images of a size; says how their maps meet.

    Args:
        task: The task around `teachers`, on the meta device.
        teachers: The teachers by name.
        entries: What the settled recipe says of each.
        size: Side of the student's images, in pixels.
        image_size: The side that heads are made for.
        sizes: All sides that the run draws from; empty: its images have one.
    """
    grid = grid_of_student(task.student, size, several=bool(sizes))
    for target in task.targets:
        entry = entries[target.teacher]
        width = entry.width_of(target.kind, teachers[target.teacher].width)
        chosen = entry.setting("head", target.kind)
        with naming_target(target.teacher, target.kind):
            try:
                _check_head(task.student, target, chosen, width, size)
            except ConfigError as error:
                if size == image_size or not isinstance(target.head, MapHead):
                    raise
                raise ConfigError(
                    f"{HEAD_WHERE}: {chosen} is made for the grids of one image size; got "
                    f"data.image_sizes {' '.join(map(str, sizes))}, expected none. Leave them out, "
                    "or take a head of single tokens, such as mlp."
                ) from error
    for name, entry in entries.items():
        teacher, title = teachers[name], called(name)
        side = teacher.side(size)
        if resolve(entry.model, entry.architecture).code:
            where = source_flag(name).removeprefix("--")
            check_map(teacher.net, side, is_trained=False, where=where)
        theirs = grid_of(title, lambda size, _, own=teacher: own.grid(size), size)
        of_maps = [t for t in task.targets if t.teacher == name and t.kind == MAP]
        ours = of_maps[0].given(grid, 0)[0] if of_maps else grid
        with naming_target(name):
            places = of_maps[0].places(grid, theirs) if of_maps else grid
        whose = "teacher" if ours == places else "student"
        log.info(
            "grids: %s %dx%d (images of %d px), student %dx%d (images of %d px): %s",
            *(title, *theirs, side, *ours, size),
            "equal" if ours == theirs else f"the {whose}'s map is resized (bilinear)",
        )


def _check_head(student: nn.Module, target: NamedTarget, name: str, width: int, size: int) -> None:
    """Runs a target's head, on the meta device, on what it will be given."""
    head = target.head
    if not isinstance(head, MapHead):
        check_head(head, name, (2, 3, student.width), width, where=HEAD_WHERE)
        return
    pixels = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        run = partial(student, pixels)
        last, blocks = with_blocks(student, run) if target.reads_blocks else (run(), ())
    if target.kind == SUMMARY:
        last, *blocks = (as_map(summary(map_)) for map_ in (last, *blocks))
    check_map_head(head, name, last, blocks, width)


def maps_of(
    student: nn.Module, teacher: Frozen, side: int, *, kind: str, with_prefix: bool
) -> Maps:
    """Returns what a head that reads maps is made for.

    Args:
        student: The student.
        teacher: The teacher.
        side: Side of the student's images, in pixels.
        kind: Whether it reads maps, or summaries as maps of one place.
        with_prefix: Whether prefix tokens are learnt with the map.
    """
    blocks = len(student.blocks())
    if kind == SUMMARY:
        return Maps((1, 1), (1, 1), 0, blocks)
    prefix = student.num_prefix_tokens if with_prefix else 0
    return Maps(student.grid(side, side), teacher.grid(side), prefix, blocks)
