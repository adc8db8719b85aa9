"""A recipe's targets are tried before a start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_runs

from fd_large.errors import ConfigError
from fd_large.tasks.distillation.job import KNOWN, DistillationJob
from fd_large.tasks.distillation.section import Summary


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teachers.a.loss", "msee", r"^teachers\.a\.loss: no such"),
        ("teachers.a.head", "mpl", r"^teachers\.a\.head: no such"),
        ("teachers.b.summary.normaliser", "non", r"^teachers\.b\.summary\.normaliser: no such"),
        ("teachers.b.whitening_eps", 0.1, None),
        ("teachers.a.temperature", 0.1, r"^teachers\.a\.temperature: unused"),
        ("teachers.b.summary.temperature", 0.1, r"^teachers\.b\.summary\.temperature: unused"),
        ("teachers.a.target_statistics", "x", r"^teachers\.a\.target_statistics: unused"),
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


def test_a_summary_has_the_temperature_of_its_map_or_its_own(run):
    entry = tiny_runs.with_teachers(run, "a").teachers["a"]
    fields = {"targets": ("map", "summary"), "loss": "relation", "temperature": 0.2}
    entry = replace(entry, **fields, summary=Summary(loss="queue", normaliser="none"))
    assert [KNOWN.loss_of(entry, kind).temperature for kind in entry.targets] == [0.2, 0.2]
    entry = replace(entry, summary=replace(entry.summary, temperature=0.1))
    assert KNOWN.loss_of(entry, "summary").temperature == 0.1
