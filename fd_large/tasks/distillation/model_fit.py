"""Do student, teachers and heads take images of a size, and how do their maps meet?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fd_large.backbones.custom.custom import check_map
from fd_large.engine.frozen import Frozen
from fd_large.engine.heads import check_head
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import resolve
from fd_large.tasks.distillation.heads.map_head import WHERE as HEAD_WHERE
from fd_large.tasks.distillation.heads.map_head import MapHead, Maps, check_map_head, with_blocks
from fd_large.tasks.distillation.section import MAP, SUMMARY, NamedTeacher, naming_target
from fd_large.tasks.distillation.target import NamedTarget, as_map, summary
from fd_large.tasks.distillation.task import Distillation
from fd_large.tasks.distillation.teacher_grids import (
    called,
    grid_of,
    grid_of_student,
    source_flag,
)

log = logging.getLogger(__name__)


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
