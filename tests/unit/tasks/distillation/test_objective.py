"""A recipe's targets are tried before a start."""

from __future__ import annotations

import pytest
import tiny_runs

from fd_large.errors import ConfigError
from fd_large.tasks.distillation.job import DistillationJob


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teachers.a.loss", "msee", r"^teachers\.a\.loss: no such"),
        ("teachers.a.head", "mpl", r"^teachers\.a\.head: no such"),
        ("teachers.b.summary.normaliser", "non", r"^teachers\.b\.summary\.normaliser: no such"),
        ("teachers.b.whitening_eps", 0.1, None),
        ("teachers.a.target_statistics", "x", r"^teachers\.a\.target_statistics: nothing in this"),
    ],
)
def test_a_mistake_names_the_teacher(run, field, value, message):
    fields = {"teachers.b.targets": ("map", "summary"), field: value}
    job = DistillationJob(tiny_runs.with_teachers(run, "a", "b", **fields))
    if message is None:
        job.check()
        return
    with pytest.raises(ConfigError, match=message) as caught:
        job.check()
    assert "objective" not in str(caught.value)
