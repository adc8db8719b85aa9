"""A task of the user's own: its section in recipes, flags and stored recipes."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from plugins import install

from fd_large import doors
from fd_large.cli.train import parse_train
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.run import Run, difference
from fd_large.tasks.jobs import job_of

TOY = """
from dataclasses import dataclass
from fd_large.engine.job import TrainingJob
from fd_large.recipes.fields import check_types, positive
from fd_large.recipes.task_kind import TaskKind

@dataclass(frozen=True, kw_only=True)
class Toy:
    # Factor of the loss, above 0.
    weight: float = 1.0
    sides: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        check_types(self, "task.toy")
        positive("task.toy.weight", self.weight)

class ToyJob(TrainingJob):
    def make_task(self):
        return self.run.task.rotation

class Fails(ToyJob):
    def __init__(self, run):
        raise KeyError("no table")

    def settle(self, sources):
        raise AssertionError

KIND = TaskKind(name="toy", job=ToyJob, section=Toy)
TAUGHT = TaskKind(name="toy", job=ToyJob, section=Toy, sections=("teacher",))
BARE = TaskKind(name="bare", job=ToyJob)
TAKEN = TaskKind(name="finetune", job=ToyJob, section=Toy)
FAILS = TaskKind(name="fails", job=Fails)
NO_JOB = TaskKind(name="no_job", job=lambda run: 3)
NO_ARGUMENT = TaskKind(name="no_argument", job=lambda: 3)
NO_TASK = 3
"""
CONFIG = ["--deepspeed_config", "zero1.json"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    doors.allow("toy.py")
    return f"module:{tmp_path}/toy.py"


def given(*arguments):
    return parse_train([*CONFIG, *arguments]).run


def test_flags_of_its_section_and_its_job(toy):
    run = given("--task.name", "module:toy.py:KIND", "--task.toy.weight", "0.5")
    assert (run.task.name, run.task.toy.weight) == (f"{toy}:KIND", 0.5)
    assert not run.frozen_models
    assert run.teacher == type(run.teacher)()  # quickstart's says nothing to this task.
    assert job_of(run).run is run


def test_recipe_json_and_back_and_from_rank_to_rank(toy):
    run = given("--task.name", "module:toy.py:KIND", "--task.toy.sides", "3", "4")
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert pickle.loads(pickle.dumps(run)) == run
    other = given("--task.name", "module:toy.py:KIND", "--task.toy.weight", "2")
    changed = difference(run, other)
    assert set(changed) == {"task.toy.weight", "task.toy.sides"}
    assert "task.toy.weight" in difference(registry.get("quickstart"), other)


def test_sections_that_it_reads_are_kept(toy):
    run = given("--task.name", "module:toy.py:TAUGHT", "--teacher.source", "random")
    assert run.frozen_models
    assert run.teacher.source == "random"
    with pytest.raises(ConfigError, match=r"objective\.beta"):
        given("--task.name", "module:toy.py:TAUGHT", "--objective.beta", "3")


def test_a_task_without_a_section(toy):
    run = given("--task.name", "module:toy.py:BARE", "--student.model", "vit_base_patch16")
    assert job_of(run).run.student.model == "vit_base_patch16"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--task.name", "module:toy.py:KIND", "--task.toy.weight", "-1"), "task.toy.weight"),
        (("--task.name", "module:toy.py:KIND", "--task.toy.wieght", "1"), "--task.toy.wieght"),
        (("--task.toy.weight", "1"), "--task.toy.weight"),
        (("--task.name", "module:toy.py:NO_TASK"), "task.name"),
        (("--task.name", "module:toy.py:TAKEN"), "task.name"),
        (("--task.name", "module:toy.py:NONE"), "--task.name"),
        (("--task.name", "module:gone.py:KIND"), "--task.name"),
    ],
)
def test_mistakes_name_the_field(toy, arguments, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        given(*arguments)


def test_a_taken_name_is_refused_with_the_names_that_are_taken(toy):
    expected = "got 'finetune', expected none of 'name', distillation, finetune, "
    with pytest.raises(ConfigError, match=expected):
        given("--task.name", "module:toy.py:TAKEN")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("FAILS", r"KeyError: 'no table' in .*toy\.py line \d+"),
        ("NO_JOB", "int"),
        ("NO_ARGUMENT", "TypeError"),
        ("BARE", r"'Task' object has no attribute 'rotation' in .*toy\.py line \d+"),
    ],
)
def test_what_its_job_raises_is_one_sentence(toy, kind, part):
    run = given("--task.name", f"module:toy.py:{kind}", "--student.model", "vit_base_patch16")
    with pytest.raises(ConfigError, match=rf"^task\.name: .*{part}"):
        job_of(run).tensor_sizes()


def test_a_stored_recipe_is_read_without_its_code(toy, monkeypatch):
    run = given("--task.name", "module:toy.py:KIND", "--task.toy.weight", "0.5")
    stored = json.loads(json.dumps(run.to_dict()))
    doors.reset()
    read = Run.from_dict(stored)
    assert read.to_dict() == stored
    assert not read.frozen_models
    assert not doors._modules
    with pytest.raises(ConfigError, match="--allow-code"):
        job_of(read)


def test_an_installed_package_brings_a_task(toy, tmp_path, monkeypatch):
    install(tmp_path, "tasks", "toys = toy:KIND")
    monkeypatch.syspath_prepend(tmp_path)
    run = given("--task.name", "toys", "--task.toy.weight", "0.5")
    assert (run.task.name, run.task.toy.weight) == ("toys", 0.5)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert job_of(run).run is run
    monkeypatch.delitem(sys.modules, "toy")
