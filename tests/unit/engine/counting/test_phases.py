"""Which phases a task has, and that a task without room is not built."""

from dataclasses import replace

import pytest
import tiny_runs

from fd_large.engine.counting import phases
from fd_large.recipes import registry
from fd_large.recipes.sections import Student
from fd_large.recipes.several_teachers import unic_vit_base
from fd_large.tasks.jobs import job_of


def measured(run, free_bytes=8e9):
    return phases.measure(job_of(run), free_bytes=free_bytes)


def several():
    """Two tiny teachers, a step in two passes."""
    alone, like = tiny_runs.tiny_run(), unic_vit_base()
    entry = alone.taught_by[""]
    return replace(
        alone,
        teacher=type(alone.teacher)(),
        objective=type(alone.objective)(),
        teachers={"first": entry, "second": entry},
        weighting=replace(like.weighting, rule="drop"),
    )


def classes():
    run = registry.get("finetune_clip_vit_base")
    student = Student(model="vit_base_patch16", architecture=tiny_runs.VIT)
    return replace(run, student=student, data=replace(run.data, image_size=32))


@pytest.mark.parametrize(
    ("run", "frozen"),
    [
        (tiny_runs.tiny_run(), {"teacher"}),
        (several(), {"teachers.first", "teachers.second", "first pass"}),
        (classes(), set()),
    ],
    ids=["teacher", "several", "classes"],
)
def test_each_frozen_model_is_a_phase_of_its_own(run, frozen, monkeypatch):
    monkeypatch.setattr(phases, "UPDATED", 1000)
    monkeypatch.setattr(phases, "ROUNDS", 1)
    found = measured(run)
    assert set(found.seconds) == frozen | {"forward", "backward"}
    assert all(line.fixed + line.each > 0 for line in found.seconds.values())
    assert found.update > 0
    assert found.images == 0


def test_a_task_without_room_is_not_timed(caplog):
    assert measured(tiny_runs.tiny_run(), free_bytes=1e5) is None
    assert "does not fit on one device" in caplog.text
