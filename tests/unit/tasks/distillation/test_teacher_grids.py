"""The size of a teacher's images and its positions follow the student's grid."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny_runs
from loading import settled

from fd_large.errors import ShapeError
from fd_large.recipes.fields import override
from fd_large.tasks.distillation.job import DistillationJob

AUTO = {"objective.teacher_image_size": "auto", "objective.interpolation": "auto"}
SIZES = {"data.image_size": 48, "data.image_sizes": (32, 48, 64)}
FREE = {"teacher.architecture.absolute_position": False}


@pytest.mark.parametrize(
    ("fields", "side", "positions", "interpolation"),
    [
        # The student's grid is 6x6; the file's positions are for 4x4 patches of 8 pixels.
        ({}, 48, 48, "none"),
        ({"teacher.architecture.image_size": 32}, 32, 32, "bilinear"),
        ({"objective.teacher_image_size": 64}, 64, 64, "bilinear"),
        ({"objective.teacher_image_size": 0}, 0, 32, "bilinear"),
        ({"objective.interpolation": "bilinear"}, 0, 32, "bilinear"),
        ({"objective.interpolation": "none"}, 48, 48, "none"),
        ({"objective.interpolation": "none", "objective.teacher_image_size": 0}, 0, 32, "none"),
        # An equal grid of 4x4: as the file is.
        ({"data.image_size": 32}, 0, 32, "none"),
    ],
)
def test_the_teachers_image_and_positions_follow(
    run, tmp_path, fields, side, positions, interpolation
):
    source = str(tiny_runs.vit_file(tmp_path))
    given = {"teacher.source": source, "data.image_size": 48, **AUTO, **fields}
    run = settled(run.with_fields(given))
    assert run.objective.teacher_image_size == side
    assert run.objective.interpolation == interpolation
    assert run.teacher_architecture().image_size == positions
    assert settled(run) == run
    fits = interpolation == "bilinear" or side or run.data.image_size == 32
    with nullcontext() if fits else pytest.raises(ShapeError, match="6x6"):
        DistillationJob(run).parameter_sizes()


@pytest.mark.parametrize(
    ("fields", "setting", "sides", "interpolation"),
    [
        # Positions for one size.
        ({}, 32, {32: 32, 48: 32, 64: 32}, "bilinear"),
        # A model of any size, on the student's images or on those that give it the same grid.
        (FREE, 0, {32: 32, 48: 48, 64: 64}, "none"),
        (FREE | {"objective.teacher_image_size": 64}, 64, {32: 64, 48: 64, 64: 64}, "bilinear"),
        (
            FREE | {"teacher.architecture.patch_size": 16, "teacher.architecture.image_size": 64},
            "auto",
            {32: 64, 48: 96, 64: 128},
            "none",
        ),
    ],
)
def test_a_teacher_has_its_size_for_each_of_the_students(
    run, fields, setting, sides, interpolation
):
    run = settled(run.with_fields({**SIZES, **AUTO, **fields}))
    assert run.objective.teacher_image_size == setting
    assert run.objective.interpolation == interpolation
    assert settled(run) == run
    job = DistillationJob(run)
    job.parameter_sizes()
    teacher = job.make_teachers()[""]
    assert {size: teacher.side(size) for size in SIZES["data.image_sizes"]} == sides
    assert job.frozen_models()["teacher"].image_size in (sides[48], 0)
    assert job.probe_batch(2).images.shape == (2, 3, 64, 64)


def test_a_settled_run_says_what_is_automatic_whatever_it_was(run):
    """A job that is not settled, as `plan` counts it, sees the same teacher."""
    automatic = override(run, AUTO)
    assert DistillationJob(automatic).parameter_sizes() == DistillationJob(run).parameter_sizes()
    (part,) = DistillationJob(automatic).frozen_models().values()
    assert part.image_size == 0
