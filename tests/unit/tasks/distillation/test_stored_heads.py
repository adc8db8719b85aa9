"""The heads of a stored run guess its teachers' maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_runs
import torch

import fd_large
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Teacher


def test_a_run_gives_back_each_teachers_map(tmp_path):
    run = tiny_runs.tiny_run()
    entry = NamedTeacher.joined(run.teacher, run.objective)
    both = replace(entry, targets=("map", "summary"), head="block")
    several = replace(
        run,
        teacher=Teacher(),
        objective=Objective(),
        teachers={"plain": replace(entry, targets=("map",)), "both": both},
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, one, labels in (
        ("one", run, ["teacher"]),
        ("several", several, ["plain", "both", "both_summary"]),
    ):
        task = tiny_runs.tiny_task(one)
        tiny_runs.store_task(tmp_path / name, one, task)
        model = fd_large.load_student(tmp_path / name)
        with torch.no_grad():
            prepared = task.prepare(images, None, None)
            student = task.student(prepared["pixels"])
            for label, target in zip(labels, task.targets, strict=True):
                expected, _ = target.compared(student, (), prepared["maps"][target.teacher])
                guess = model.teacher_map(label, images).flatten(2).transpose(1, 2)
                assert torch.equal(guess, expected[:, -guess.shape[1] :]), label
    with pytest.raises(ConfigError, match=r"teacher_map: .*'plane' .*nearest: plain"):
        model.teacher_map("plane", images)
    with pytest.raises(ConfigError, match=r"teacher_map: .*expected a run|a run that has heads"):
        fd_large.load_student(f"{tmp_path / 'one'}#teacher").teacher_map("teacher", images)
