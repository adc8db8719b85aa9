"""The heads of a stored run guess its teachers' maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_runs
import torch

import fd_large
from fd_large.cli.export import export
from fd_large.engine.zero.partition import running_statistics
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.normalisers import make_normaliser
from fd_large.tasks.distillation.section import Objective
from fd_large.tasks.distillation.target_statistics import statistics_of, write
from fd_large.tasks.distillation.task import Seen


def test_runs_and_exports_give_back_what_each_teacher_gives(tmp_path, caplog):
    run = tiny_runs.tiny_run()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, one, labels in (
        ("one", run, ["teacher"]),
        ("several", tiny_runs.several_teachers(run), ["plain", "both", "both_summary"]),
    ):
        task = tiny_runs.tiny_task(one)
        statistics = running_statistics(task)
        for label, held in statistics.items():
            held.copy_(torch.rand_like(held) + ("deviation" in label))
        tiny_runs.store_task(tmp_path / name, one, task, others=statistics)
        model = fd_large.load_student(tmp_path / name)
        export(str(tmp_path / name), str(tmp_path / f"{name} out"), "timm", "2KB")
        exported = fd_large.load_student(tmp_path / f"{name} out")
        with torch.no_grad():
            prepared = task.prepare(images, None, None)
            student = task.student(prepared["pixels"])
            for label, target in zip(labels, task.targets, strict=True):
                expected, wanted = target.compared(Seen(student), prepared["maps"][target.teacher])
                guess = model.teacher_map(label, images).flatten(2).transpose(1, 2)
                assert torch.equal(guess, expected[:, -guess.shape[1] :]), label
                again = exported.teacher_map(label, images).flatten(2).transpose(1, 2)
                assert torch.allclose(again, guess, rtol=0, atol=1e-6), label
                if label == "teacher":
                    with pytest.raises(ConfigError, match=r"teacher_map: .*whitening"):
                        model.teacher_map(label, images, in_teacher_units=True)
                    continue
                # What undoes the normaliser turns learnt targets into what the teacher gives.
                head = exported.heads[label]
                learnt = target.normalise(wanted)
                undone = learnt if head.undo is None else head.undo(learnt, 0)
                assert torch.allclose(undone, wanted, atol=1e-5), label
    assert torch.equal(
        exported.teacher_summary("both", images),
        exported.teacher_map("both_summary", images)[..., 0, 0],
    )
    assert "left out" not in caplog.text
    with pytest.raises(ConfigError, match=r"'plane', nearest: plain"):
        model.teacher_map("plane", images)
    with pytest.raises(ConfigError, match=r"expected a run"):
        fd_large.load_student(f"{tmp_path / 'one'}#teacher").teacher_map("teacher", images)


@pytest.mark.parametrize("student", ["token", "dropped"])
def test_an_export_has_the_student_without_mask_token_and_decoder(tmp_path, caplog, student):
    """Heads on a decoder's map are left out with it; others guess from the student's map."""
    vit = Student(model="vit_base_patch16", architecture=tiny_runs.VIT)
    mask = {"sampler": "random", "student": student, "ratio": 0.5, "decoder_width": 32}
    if student == "dropped":
        mask["decoder_depth"] = 1
    fields = {f"mask.{name}": value for name, value in mask.items()}
    run = replace(tiny_runs.tiny_run(), student=vit).with_fields(fields)
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path / "run", run, task)
    for library in ("timm", "fd"):
        export(str(tmp_path / "run"), str(tmp_path / library), library, "2KB")
        exported = fd_large.load_student(tmp_path / library)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            expected = task.student(task.prepare(images, None, None)["pixels"]).tokens
        found = exported(images).flatten(2).mT
        assert torch.allclose(found, expected[:, 1:], atol=1e-5)
        if student == "token":
            assert exported.teacher_map("teacher", images).shape == (2, 16, 4, 4)
            continue
        with pytest.raises(ConfigError, match="no head"):
            exported.teacher_map("teacher", images)
        with pytest.raises(ConfigError, match="this run's heads read the map of a decoder"):
            fd_large.load_student(tmp_path / "run").teacher_map("teacher", images)
    assert ("heads are left out" in caplog.text) == (student == "dropped")


@pytest.mark.parametrize("name", ["standardise", "phi_s"])
def test_statistics_of_a_file_are_undone(tmp_path, name):
    mixed = torch.randn(6, 6, dtype=torch.float64)
    write(tmp_path / "file", statistics_of(torch.rand(6).double(), mixed @ mixed.T, {}))
    normaliser = make_normaliser(name, eps=1e-5, statistics=str(tmp_path / "file"))
    tokens = torch.randn(2, 5, 6)
    undo = normaliser.undo()
    assert torch.allclose(undo(normaliser(tokens), 1), tokens, atol=1e-4)


def test_an_export_without_its_teachers_and_a_damaged_one(tmp_path, caplog):
    run = tiny_runs.tiny_run()
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path / "run", run, task)
    own = replace(run, objective=Objective(head="module:gone.py:Head"))
    tiny_runs.store_task(tmp_path / "own", own, task)
    for name in ("run", "own"):
        export(str(tmp_path / name), str(tmp_path / f"{name} out"), "fd", "5GB")
    assert "heads are left out" in caplog.text
    model = fd_large.load_student(tmp_path / "own out")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"expected a run"):
        model.teacher_map("teacher", images)
    (tmp_path / "run out/heads/config.json").write_text('{"task": "distillation", "heads": [1]}')
    with pytest.raises(WeightsError, match="heads of an export"):
        fd_large.load_student(tmp_path / "run out").teacher_map("teacher", images)
