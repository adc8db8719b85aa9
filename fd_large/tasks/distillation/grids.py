"""Chooses the image sides and grids of student and teachers, and checks that heads fit them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, cached_property, partial
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
from fd_large.tasks.distillation.heads.map_head import (
    MapHead,
    MapShapes,
    check_map_head,
    with_blocks,
)
from fd_large.tasks.distillation.section import (
    MAP,
    SUMMARY,
    NamedTeacher,
    called,
    naming_target,
    source_flag,
)
from fd_large.tasks.distillation.target import NamedTarget, as_map, summary
from fd_large.tasks.distillation.task import Distillation

log = logging.getLogger(__name__)

Around = Callable[[Frozen, NamedTeacher, int], Frozen]


def grid_of(whose: str, of_side: Callable[[int, int], Grid], side: int) -> Grid:
    """Returns the rows and columns of a model's map of square images.

    Args:
        whose: The model's name in messages.
        of_side: Returns the model's grid for images of (height, width).
        side: Side of the images, in pixels.

    Raises: ShapeError: if the model accepts no images of this side; the message names the model.
    """
    try:
        return of_side(side, side)
    except ShapeError as error:
        raise ShapeError(f"{whose}: {error}") from None


def grid_of_student(net: nn.Module, side: int, *, several: bool) -> Grid:
    """Returns the rows and columns of the student's map.

    Args:
        net: The student, on the meta device.
        side: Side of the student's images, in pixels.
        several: Whether the run has several image sizes. If True, the student's forward runs too,
            since some models reject an image size only in their forward.

    Raises: ShapeError: if the student accepts no images of this side.
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


class TeacherOnShapes:
    """Finds the image side and the grid of a teacher for a student, by models without weights.

    The models are on PyTorch's meta device, so that only shapes are computed.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe; only `settled` accepts the model "auto".
        student: The student's section of the recipe, with all fields set that its weights decide.
        image_size: Side of the student's images, in pixels; in a run with several sides, the side
            in evaluations.
        sizes: All sides of the student's images in a run with several sides; otherwise empty.
        around: Called with the teacher, its entry and the side of the student's images; returns the
            teacher in a wrapper, as `Mosaic`. None for no wrapper.
    """

    def __init__(
        self,
        name: str,
        entry: NamedTeacher,
        student: Student,
        *,
        image_size: int,
        sizes: Sequence[int] = (),
        around: Around | None = None,
    ) -> None:
        self.name, self.entry, self._around = name, entry, around
        self._student, self._image_size, self._sizes = student, image_size, tuple(sizes)

    def make(self) -> Frozen:
        """Constructs the teacher with random weights, for all sides of the student's images.

        Raises:
            ConfigError: if the entry's model or image size is still "auto", since the weights have
                not been opened yet.
        """
        return self._made(self.entry, self._image_size, self.sides)

    def _made(
        self,
        entry: NamedTeacher,
        image_size: int,
        sides: Mapping[int, int] = MappingProxyType({}),
    ) -> Frozen:
        """Constructs the teacher of an entry with random weights.

        Args:
            entry: The entry.
            image_size: Side of the student's images, in pixels.
            sides: Side of the teacher's images for each of several sides of the student's images;
                empty to take the side from the entry.
        """
        where = source_flag(self.name)
        side = sides.get(image_size, entry.teacher_image_size)
        require(
            entry.model != AUTO and side != AUTO,
            f"{where.removesuffix('.source')}.model: auto means the model that the weights belong "
            "to",
            f"{where} {entry.source!r}",
            "a source of weights",
            f"Set {where}, or name a model",
        )
        assert isinstance(side, int)
        frozen = frozen_maker(
            entry,
            image_size=image_size,
            own_image_size=side,
            sides=sides,
            residual_dtype=entry.residual_dtype,
            before_norm=entry.layer == "before_norm",
        )()
        return self._around(frozen, entry, image_size) if self._around else frozen

    @property
    def gives_summary(self) -> bool:
        """Whether the teacher's model returns a summary besides its map."""
        with torch.device("meta"):
            return getattr(self.make().net, "gives_summary", False)

    @cached_property
    def sides(self) -> dict[int, int]:
        """Side of the teacher's images for each side of the student's images, in pixels.

        The dictionary is empty unless the student's images have several sides.
        """
        if not self._sizes:
            return {}
        if self.entry.teacher_image_size != AUTO:
            section = asdict(self.entry)
            return {size: image_side_of(section, size) for size in self._sizes}
        grids = self._grids_of_student(self._sizes)
        return {size: self._side_and_grid(self.entry, grids[size], size)[0] for size in self._sizes}

    @property
    def image_size(self) -> int:
        """Side of the teacher's images in evaluations, in pixels.

        0 stands for the side of the student's images or, for a teacher whose table of positions
        allows only one side, for this side.

        Raises: ConfigError: if the side is still "auto", since weights have not been opened yet.
        """
        size = self.sides.get(self._image_size, self.entry.teacher_image_size)
        if not isinstance(size, int):
            field = f"teachers.{self.name}" if self.name else "objective"
            raise ConfigError(
                f"{field}.teacher_image_size: the run does not record this size; got {size!r}, "
                "expected a side in pixels. Name the teacher by its own source instead."
            )
        return size

    def settled(self, *, follows: bool) -> NamedTeacher:
        """Returns the teacher's entry, in which an "auto" image size or interpolation is chosen.

        In a run with several image sizes, a chosen image size is 0 if the teacher's images always
        have the side of the student's images, and a number if the teacher's images have one side.
        In all other cases the image size stays "auto", and `sides` has the teacher's image sizes.
        The entry is returned unchanged if its model is "auto".

        Args:
            follows: Whether the teacher's position embeddings may be resized to the side of the
                teacher's images.
        """
        entry, image_size = self.entry, self._image_size
        is_automatic = AUTO in (entry.interpolation, entry.teacher_image_size)
        if not is_automatic or entry.model == AUTO:
            return entry
        architecture = resolve(entry.model, entry.architecture)
        if entry.mosaic and entry.teacher_image_size in (0, AUTO):
            # The mosaic has the size that the teacher was trained at.
            size = architecture.fixed_image_size or own_image_size(entry.model, architecture)
            require(
                bool(size),
                f"teachers.{self.name}.mosaic: the size of the mosaic is not known",
                f"{entry.mosaic} with teacher_image_size {entry.teacher_image_size}",
                "pixels",
                f"Set --teachers.{self.name}.teacher_image_size",
            )
            entry = replace(entry, teacher_image_size=size)
        follows = follows and family_of(architecture).resizes(architecture)
        several = self._sizes if set(self._sizes) - {image_size} else ()
        grids = self._grids_of_student(several)
        side, grid, met = self._meeting(entry, grids[image_size], image_size, follows=follows)
        agree = grid in (grids[image_size], None)
        if several:
            met = replace(met, teacher_image_size=entry.teacher_image_size)
            pairs = {size: self._side_and_grid(met, grids[size], size) for size in several}
            agree = all(grid in (grids[size], None) for size, (_, grid) in pairs.items())
            if entry.teacher_image_size == AUTO:
                teacher_sides = {size: side for size, (side, _) in pairs.items()}
                same = set(teacher_sides.values())
                side = same.pop() if len(same) == 1 else AUTO
                if all(size == side for size, side in teacher_sides.items()):
                    side = 0
        interpolation = entry.interpolation
        if interpolation == AUTO:
            interpolation = "none" if agree else "bilinear"
        return replace(met, teacher_image_size=side, interpolation=interpolation)

    def _grids_of_student(self, sizes: Sequence[int]) -> dict[int, Grid]:
        """Returns the student's grid for each side of its images.

        Args:
            sizes: The sides; empty for the side in evaluations alone.
        """
        with torch.device("meta"):
            net = make_student(
                self._student, image_size=self._image_size, resizes_positions=bool(sizes)
            )
        every = sizes or [self._image_size]
        return {side: grid_of_student(net, side, several=bool(sizes)) for side in every}

    def _side_and_grid(
        self, entry: NamedTeacher, student_grid: Grid, size: int
    ) -> tuple[int, Grid | None]:
        """Returns the side of the teacher's images in pixels, and the grid of its map.

        Args:
            entry: The teacher's entry.
            student_grid: Rows and columns of the student's map.
            size: Side of the student's images, in pixels.

        Returns: (side, grid); the grid is None if the teacher rejects the side.
        """
        side, grid, _ = self._meeting(entry, student_grid, size, follows=False)
        return image_side_of(asdict(replace(entry, teacher_image_size=side)), size), grid

    def _meeting(
        self, entry: NamedTeacher, student_grid: Grid, size: int, *, follows: bool
    ) -> tuple[int, Grid | None, NamedTeacher]:
        """Chooses the side of the teacher's images if it is "auto", and finds the teacher's grid.

        Args:
            entry: The teacher's entry.
            student_grid: Rows and columns of the student's map.
            size: Side of the student's images, in pixels.
            follows: See `settled`.

        Returns: (side, grid, entry). The side of the teacher's images is 0 if they are not resized.
            The grid of the teacher's map is None if the teacher rejects the side. The entry is the
            teacher's, with position embeddings for the side if these must be resized.
        """

        @cache  # The side that is chosen has been tried.
        def at(side: int) -> tuple[Grid | None, NamedTeacher]:
            """Returns the teacher's grid for images of side `side`, and an entry that accepts them.

            The grid is None if the teacher rejects the side; the entry is then the recipe's. If the
            position embeddings must be resized to `side`, the entry says so.

            Args:
                side: Side of the teacher's images, in pixels; 0 for images that are not resized.
            """
            resized = replace(entry, architecture=replace(entry.architecture, image_size=side))
            for model in (entry, resized) if follows and side else (entry,):
                # Errors that do not depend on the size are raised by the call with side 0.
                with torch.device("meta"), suppress(FDError if side else ShapeError):
                    tried = replace(model, teacher_image_size=side)
                    return self._made(tried, size).grid(size), model
            return None, entry

        side = entry.teacher_image_size
        if side == AUTO:
            side, here = 0, at(0)[0]
            is_resized = here and entry.interpolation == "bilinear"
            if here != student_grid and not is_resized:
                side = teacher_side(
                    student_grid,
                    lambda side: at(side)[0],
                    image_size=size,
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
    """Checks that models and heads fit an image size, and logs how grids are aligned.

    Args:
        task: The task with these teachers, on the meta device.
        teachers: The teachers by name.
        entries: The recipe's entry of each teacher, by name, from `DistillationJob.settled`.
        size: Side of the student's images, in pixels.
        image_size: Side of the images for which the heads were made, in pixels.
        sizes: All image sides of a run with several sides, otherwise empty.

    Raises: ConfigError or ShapeError: if a model or a head does not fit.
    """
    grid = grid_of_student(task.student, size, several=bool(sizes))
    for target in task.targets:
        entry = entries[target.teacher]
        width = entry.width_of(target.kind, teachers[target.teacher].width)
        chosen = entry.setting("head", target.kind)
        with naming_target(target.teacher, target.kind):
            try:
                _check_head(task, target, chosen, width, size, grid)
            except ConfigError as error:
                if size == image_size or not isinstance(target.head, MapHead):
                    raise
                raise ConfigError(
                    f"{HEAD_WHERE}: {chosen} is made for a single image size; got "
                    f"data.image_sizes {' '.join(map(str, sizes))}, expected no such sizes. Leave "
                    "out data.image_sizes, or use a head of single tokens, such as mlp."
                ) from error
    for name, entry in entries.items():
        teacher, title = teachers[name], called(name)
        side = teacher.side(size)
        if resolve(entry.model, entry.architecture).code:
            where = source_flag(name).removeprefix("--")
            check_map(teacher.net, side, is_trained=False, where=where)
        theirs = grid_of(title, lambda size, _, model=teacher: model.grid(size), size)
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
    if task.sight.description:
        log.info("%s", task.sight.description)


def _check_head(
    task: Distillation, target: NamedTarget, name: str, width: int, size: int, grid: Grid
) -> None:
    """Runs a target's head on the meta device, on an input shaped as in training.

    Args:
        task: The task, on the meta device.
        target: The target.
        name: The head's name in the recipe.
        width: Number of channels that the head's output must have.
        size: Side of the student's images, in pixels.
        grid: Rows and columns of the student's map.

    Raises: ConfigError: if the head fails, or if its output has another shape.
    """
    head, student = target.head, task.student
    if not isinstance(head, MapHead):
        # A head may put the tokens of a map back onto the student's grid.
        places = 1 if target.kind == SUMMARY else math.prod(grid)
        shape = (2, places, task.sight.width(student))
        check_head(head, name, shape, width, where=HEAD_WHERE)
        return
    pixels = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        run = partial(student, pixels)
        last, blocks = with_blocks(student, run) if target.reads_blocks else (run(), ())
    if target.kind == SUMMARY:
        last, *blocks = (as_map(summary(map_)) for map_ in (last, *blocks))
    check_map_head(head, name, last, blocks, width)


def shapes_of(
    student: nn.Module, teacher: Frozen, side: int, *, kind: str, with_prefix: bool
) -> MapShapes:
    """Returns the shapes from which a `MapHead` is made.

    Args:
        student: The student.
        teacher: The teacher.
        side: Side of the student's images, in pixels.
        kind: "map", or "summary", which counts as a map of a single patch.
        with_prefix: Whether the prefix tokens (CLS) of the map are learnt too.
    """
    blocks = len(student.blocks())
    if kind == SUMMARY:
        return MapShapes((1, 1), (1, 1), 0, blocks)
    prefix = student.num_prefix_tokens if with_prefix else 0
    return MapShapes(student.grid(side, side), teacher.grid(side), prefix, blocks)
