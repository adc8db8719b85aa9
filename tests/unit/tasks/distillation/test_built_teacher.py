"""A teacher has the type of the student's products, unless its entry names one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_runs

from fd_large.recipes.run import ONLY
from fd_large.tasks.distillation.built_teacher import built_teacher
from fd_large.tasks.distillation.teacher_grids import teacher_maker
from fd_large.weights.resolve import Sources


@pytest.mark.parametrize(
    ("dtype", "student_type", "held"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_its_type_and_that_random_weights_are_said(dtype, student_type, held, caplog):
    usual = tiny_runs.tiny_run().taught_by[ONLY]
    entry = replace(usual, dtype=dtype, teacher_image_size=0)
    teacher = built_teacher(
        "",
        entry,
        teacher_maker("", entry, 32),
        Sources(),
        student_type=student_type,
        seed=1,
        node_size=1,
        persistence_threshold=0,
    )
    assert {str(p.dtype) for p in teacher.module.parameters()} == {f"torch.{held}"}
    assert "teacher: RANDOM weights (--teacher.source random)" in caplog.text
