"""The sides of teachers' images, how maps meet, and which heads fit them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny_runs
from loading import settled

from fd_large import doors
from fd_large.errors import ConfigError, FDError, ShapeError
from fd_large.recipes.architectures import resolve
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
    assert resolve(run.teacher.model, run.teacher.architecture).image_size == positions
    assert settled(run) == run
    fits = interpolation == "bilinear" or side or run.data.image_size == 32
    with nullcontext() if fits else pytest.raises(ShapeError, match="6x6"):
        DistillationJob(run).tensor_sizes()


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
    job.tensor_sizes()
    teacher = job.make_teachers()[""]
    assert {size: teacher.side(size) for size in SIZES["data.image_sizes"]} == sides
    assert job.frozen_models()["teacher"].image_size in (sides[48], 0)
    assert job.probe_batch(2).images.shape == (2, 3, 64, 64)


def test_a_settled_run_says_what_is_automatic_whatever_it_was(run):
    """A job that is not settled, as `plan` counts it, sees the same teacher."""
    automatic = override(run, AUTO)
    assert DistillationJob(automatic).tensor_sizes() == DistillationJob(run).tensor_sizes()
    (part,) = DistillationJob(automatic).frozen_models().values()
    assert part.image_size == 0


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data.image_size", 36, "^student: "),
        ("objective.teacher_image_size", 36, "^teacher: "),
        ("objective.teacher_image_size", 16, r"4.?x.?4.*2.?x.?2|interpolation"),
    ],
)
def test_maps_that_do_not_fit_are_refused(run, field, value, named):
    with pytest.raises(ShapeError, match=named):
        DistillationJob(override(run, {field: value})).tensor_sizes()


def test_a_ladder_stands_on_blocks_of_one_shape_and_learns_summaries_too(run):
    with pytest.raises(ConfigError, match=r"objective\.head.*blocks"):
        DistillationJob(override(run, {"objective.head": "ladder"})).tensor_sizes()
    vit = {"model": "vit_base_patch16", "architecture.depths": (2,), "architecture.embed_dim": 8}
    vit |= {"architecture.num_heads": (2,), "architecture.patch_size": 8}
    fields = {f"student.{name}": value for name, value in vit.items()}
    fields |= {f"teachers.a.{name}": value for name, value in vit.items()}
    fields |= {"teachers.a.source": "random", "teachers.a.head": "ladder"}
    run = run.with_fields({**fields, "teachers.a.targets": ("map", "summary")})
    heads = DistillationJob(run).models_on_shapes()[0].heads["a"]
    assert [heads[kind].cls for kind in ("map", "summary")] == [None, None]
    assert heads["map"].grid == (4, 4)
    assert heads["summary"].grid == (1, 1)
    DistillationJob(run).tensor_sizes()


def test_a_head_may_put_the_tokens_onto_their_grid(run, tmp_path):
    code = tmp_path / "onto_grid.py"
    code.write_text(
        "from torch import nn\n"
        "class OntoGrid(nn.Linear):\n"
        "    def forward(self, tokens):\n"
        "        side = round(tokens.shape[1] ** 0.5)\n"
        "        grid = tokens.unflatten(1, (side, side))\n"
        "        return super().forward(grid.transpose(1, 2)).flatten(1, 2)\n"
    )
    doors.allow(code)
    DistillationJob(override(run, {"objective.head": f"module:{code}:OntoGrid"})).tensor_sizes()


def test_a_line_says_how_the_grids_meet(run, caplog):
    with caplog.at_level("INFO"):
        DistillationJob(override(run, {"data.image_size": 48})).tensor_sizes()
    assert "teacher 4x4 (images of 32 px), student 6x6 (images of 48 px)" in caplog.text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data.image_sizes": (48, 36)}, r"data\.image_sizes: 36: student"),
        (
            {"teacher.architecture.absolute_position": False, "objective.head": "convolutional"},
            r"objective\.head: convolutional .*data\.image_sizes",
        ),
        ({"objective.interpolation": "none"}, "interpolation"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(run, fields, named):
    run = run.with_fields({**SIZES, **AUTO, **fields})
    with pytest.raises(FDError, match=named):
        DistillationJob(settled(run)).tensor_sizes()
