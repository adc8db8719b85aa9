"""Models and heads that do not take images of a size are refused; how maps meet is said."""

from __future__ import annotations

import pytest
from loading import settled

from fd_large.errors import ConfigError, FDError, ShapeError
from fd_large.recipes.fields import override
from fd_large.tasks.distillation.job import DistillationJob

SIZES = {"data.image_size": 48, "data.image_sizes": (32, 48, 64)}
AUTO = {"objective.teacher_image_size": "auto", "objective.interpolation": "auto"}


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
        DistillationJob(override(run, {field: value})).parameter_sizes()


def test_a_ladder_stands_on_blocks_of_one_shape_and_learns_summaries_too(run):
    with pytest.raises(ConfigError, match=r"objective\.head.*blocks"):
        DistillationJob(override(run, {"objective.head": "ladder"})).parameter_sizes()
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
    DistillationJob(run).parameter_sizes()


def test_a_line_says_how_the_grids_meet(run, caplog):
    with caplog.at_level("INFO"):
        DistillationJob(override(run, {"data.image_size": 48})).parameter_sizes()
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
        DistillationJob(settled(run)).parameter_sizes()
