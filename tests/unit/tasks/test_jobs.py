"""The three faces of a task of the user's own, of which it has the first alone."""

from __future__ import annotations

import json

import pytest
import tiny_runs
import torch
from page_examples import EXAMPLES
from PIL import Image
from stored_run import store_tensors

from fd_large import doors
from fd_large.cli.main import main
from fd_large.cli.train import parse_train
from fd_large.engine.job import Job, TrainingJob
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.stored import StoredDistillation
from fd_large.tasks.jobs import heads_of, job_of, stored_run_of
from fd_large.tasks.stored_run import StoredRun

MORE = """
from fd_large.engine.job import Job
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.stored_run import StoredRun, StoredScores


class Earlier(Job):
    make_task = ColourJob.make_task


class EarlierScored(Earlier):
    def score_stored(self, reader, folder):
        return ()


class ColourRun(StoredRun):
    def score(self, reader, folder):
        return StoredScores((self.job.run.name,), ())


class EarlierHeads(Earlier):
    def initial_heads(self):
        return {}


class OwnDistillation(DistillationJob):
    pass


HEADS = TaskKind(name="colour", job=EarlierHeads, section=Colour)
OURS = TaskKind(name="colour", job=OwnDistillation, section=Colour)
EARLIER = TaskKind(name="colour", job=Earlier, section=Colour)
SCORED = TaskKind(name="colour", job=EarlierScored, section=Colour)
BOTH = TaskKind(name="colour", job=ColourJob, section=Colour, stored=ColourRun)
"""


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Makes a recipe of a kind in colour.py, the task of docs/extending.md."""
    (tmp_path / "colour.py").write_text(EXAMPLES["colour.py"] + MORE)
    monkeypatch.chdir(tmp_path)
    doors.allow("colour.py")
    student = tiny_runs.tiny_run().student
    fields = {
        "task.name": None,
        "student.model": student.model,
        "student.architecture.embed_dim": student.architecture.embed_dim,
        "student.architecture.depths": student.architecture.depths[0],
        "student.architecture.num_heads": student.architecture.num_heads[0],
        "data.image_size": 32,
    }

    def make(kind="KIND"):
        fields["task.name"] = f"module:colour.py:{kind}"
        words = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
        return parse_train(["--deepspeed_config", "zero1.json", *words]).run

    return make


@pytest.fixture
def folder(run_of, tmp_path):
    """A stored run of it."""
    run, where = run_of(), tmp_path / "run"
    torch.manual_seed(0)
    task = job_of(run).make_task()
    store_tensors(where, {n: p.detach() for n, p in task.named_parameters()}, recipe=run.to_dict())
    (where / "recipe.json").write_text(json.dumps(run.to_dict()))
    return where


def test_commands_export_the_student_and_refuse_the_rest_in_a_sentence(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "fd"]) == 0
    assert "the backbone of a module" in (tmp_path / "out" / "README.md").read_text()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["predict", str(folder), str(tmp_path / "a.png")]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("predict: the task module:")
    assert "; got " in told
    assert ", expected " in told
    out = str(tmp_path / "heads")
    assert main(["export", str(folder), out, "--to", "upernet"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("export: --to upernet: ")
    assert not heads_of(job_of(json.loads((folder / "recipe.json").read_text())), folder)


def test_its_stored_runs_are_asked_where_its_kind_names_their_class(run_of, tmp_path):
    run = run_of("BOTH")
    stored = stored_run_of(job_of(run))
    assert stored.score(None, tmp_path).tables == (run.name,)
    plain = stored_run_of(job_of(run_of()))
    assert type(plain) is StoredRun
    with pytest.raises(ConfigError, match=r"^evaluate: .*; got "):
        plain.score(None, tmp_path)


def test_a_job_of_earlier_versions_trains_and_its_commands_have_moved(run_of):
    assert Job is TrainingJob
    assert job_of(run_of("EARLIER")).make_task().head.out_features == 3
    job = job_of(run_of("SCORED"))
    assert job.tensor_sizes()
    with pytest.raises(ConfigError, match=r"^task\.name: EarlierScored\.score_stored .*score\(\)"):
        stored_run_of(job)


def test_what_the_engine_no_longer_asks_a_job_is_refused(run_of):
    with pytest.raises(ConfigError, match=r"^task\.name: EarlierHeads\.initial_heads "):
        job_of(run_of("HEADS"))


def test_a_job_that_is_one_of_ours_is_stored_as_ours_is(run_of):
    run = run_of("OURS")
    job = object.__new__(run.task.kind().job)  # Made without a recipe that has a teacher.
    job.run = run
    assert type(stored_run_of(job)) is StoredDistillation
