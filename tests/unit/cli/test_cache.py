"""The command cache: what it says before it writes, and what it refuses."""

from __future__ import annotations

import math
import os
import re
import signal

import pytest
import tiny_runs
from pictures import write_pictures

from fd_large.cli import cache, plan_workload, stopping
from fd_large.cli.main import main
from fd_large.engine import opening
from fd_large.errors import ConfigError
from fd_large.plan.cached_targets import CachedTargets
from fd_large.ranks.processes import SIGNALS
from fd_large.recipes.fields import flat

TINY = [
    word
    for name, value in flat(tiny_runs.tiny_run()).items()
    if name.startswith(("student.architecture", "teacher.architecture")) and value
    for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
]


def command(*words: str) -> int:
    models = ["--student.model", "swinv2_tiny", "--teacher.model", "clip_vit_base_patch16"]
    fields = ["--data.image_size", "32", "--teacher.source", "random", *models, *TINY]
    return main(["cache", "quickstart", "out", *fields, *words])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_the_plan_says_whether_it_pays_and_writes_nothing(folder, capsys):
    write_pictures(folder / "images", 6)
    images = ["--data.root", str(folder / "images"), "--precision", "fp16", "--views", "4"]
    assert command(*images, "--plan", "--runs", "2", "--optim.epochs", "10") == 0
    said = capsys.readouterr().out
    # 17 tokens of 16 channels, two float32 each, a thumbnail and a checksum.
    assert f"{(17 * (2 * 16 + 8) + 64 + 8) / 1e3:,.1f} kB" in said
    assert "6 images x 4 views" in said
    assert "free disk" in said
    assert "PAY" in said.upper()
    assert not (folder / "out").exists()


def test_the_plan_of_a_recipe_of_record_counts_no_step(monkeypatch, capsys):
    monkeypatch.setattr(plan_workload, "count_anew", lambda *_, **__: pytest.fail("counted anew"))
    assert main(["cache", "quickstart", "out", "--plan", "--images", "6"]) == 0
    said = capsys.readouterr().out
    assert "6 images x 1 views" in said
    assert "cached targets pay: 1" in said


@pytest.mark.parametrize(
    ("teacher", "uses", "told"),
    [
        (1.0, 10.0, "cached targets pay: 45 % less time"),
        (1.0, 1.0, "CACHED TARGETS DO NOT PAY: each view is used too seldom (1)"),
        (0.01, 10.0, "cached targets hardly pay: at most 2 % less time"),
    ],
)
def test_the_verdict_agrees_with_the_uses_from_which_it_pays(teacher, uses, told):
    cost = CachedTargets(
        images=6,
        views=1,
        uses=uses,
        map_bytes=1000,
        teacher_seconds=teacher,
        student_seconds=1.0,
        read_bytes_per_second=1e9,
    )
    said = dict(cache._rows(cost, cache.Cache(recipe="quickstart", out="out"), 16))
    assert said["saves time"] == "if each view is used more than once"
    assert said["verdict"] == told
    assert said["time to write"].startswith(f"about 0:0{math.ceil(6 * teacher)} on one h100")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--views", "-1"], "--views"),
        (["--precision", "int4"], "--precision"),
        (["--read_gb", "0"], "--read_gb"),
        (["--task.distillation.views", "-1"], "task.distillation.views"),
        (["--task.distillation.cache", "x"], "task.distillation.cache"),
        (["--data.root", "/no/such"], "data.root"),
    ],
)
def test_mistakes_name_their_argument(words, named, capsys):
    assert command(*words) == 2
    assert named in capsys.readouterr().err


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_it_and_its_clean_up_is_not_interrupted(
    number, handlers, monkeypatch, capsys
):
    cleaned_up = []

    def open_frozen(*_):
        try:
            os.kill(os.getpid(), number)
        finally:
            for again in (signal.SIGINT, number):
                os.kill(os.getpid(), again)
            cleaned_up.append(True)

    monkeypatch.setattr(opening, "open_frozen", open_frozen)
    assert command() == 75
    assert cleaned_up
    assert "same command" in capsys.readouterr().err


def test_what_ends_without_a_signal_gives_the_handlers_back(handlers, monkeypatch):
    def open_frozen(*_):
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
        raise ConfigError("wrong")

    monkeypatch.setattr(opening, "open_frozen", open_frozen)
    # None stands for a handler that is not Python's.
    replaced = {**handlers, signal.SIGUSR1: None}
    monkeypatch.setattr(stopping, "handlers_to_replace", lambda: replaced)
    assert command() == 2
    kept = [number for number in SIGNALS if signal.getsignal(number) == handlers[number]]
    assert kept == [number for number in SIGNALS if number != signal.SIGUSR1]


@pytest.mark.parametrize(
    ("name", "told"),
    [("", "--teacher.source cached:out"), ("b", "--teachers.b.source cached:out/b")],
)
def test_it_tells_the_flag_of_each_teachers_maps(name, told, monkeypatch, capsys):
    monkeypatch.setattr(cache, "write", lambda *_, **__: {name: 3})
    assert command() == 0
    assert capsys.readouterr().out.endswith(f"3 maps written; train with {told}\n")


def test_a_mistyped_recipe_is_told_as_it_was_given(capsys):
    assert main(["cache", "quickstrt", "out"]) == 2
    assert re.match(r"cache: .*'quickstrt', nearest: quickstart\.", capsys.readouterr().err)


def test_a_recipe_without_a_teacher_is_refused(capsys):
    assert main(["cache", "finetune_swinv2_base", "out"]) == 2
    assert "teacher" in capsys.readouterr().err
