"""Fields that left: refused with what to do instead, read past in stored recipes."""

from __future__ import annotations

import json
import logging

import pytest
from launch import ROOT

from fd_large import api
from fd_large.cli.main import main
from fd_large.cli.train import parse_train
from fd_large.errors import ConfigError
from fd_large.recipes import left, registry
from fd_large.recipes.fields import field_names, nested
from fd_large.recipes.left import LEFT
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe

IN_USE = {"optim.max_seconds": 240.0, "data.stage_to": "/disk"}
TRAIN = ["--deepspeed_config", "zero1"]


@pytest.fixture(autouse=True)
def unsaid():
    left._log.cache_clear()


def test_what_left_is_no_field_and_has_a_value_to_try():
    assert not LEFT.keys() & field_names(Run).keys()
    assert LEFT.keys() == IN_USE.keys()


def test_the_docs_show_the_table():
    rows = [f"| `{name}` | {one.version} | {one.remedy} |" for name, one in LEFT.items()]
    page = (ROOT / "docs" / "stability.md").read_text().splitlines()
    start = page.index("| field | left in | instead |") + 2
    assert page[start : start + len(rows)] == rows
    assert not page[start + len(rows)]


@pytest.mark.parametrize("name", LEFT)
def test_it_is_refused_with_its_remedy(name, tmp_path, capsys):
    remedy = LEFT[name].remedy
    assert main(["train", *TRAIN, f"--{name}", str(LEFT[name].idle)]) == 2
    said = capsys.readouterr().err
    assert f"--{name}: " in said
    assert remedy in said
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {IN_USE[name]}\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml:1: {name}: .*{remedy}"):
        parse_train([*TRAIN, "--config", str(file)])
    with pytest.raises(ConfigError, match=remedy):
        api.recipe("quickstart", **{name: IN_USE[name]})


def test_the_recipe_of_a_run_that_did_not_use_it_is_a_run_file(tmp_path):
    run = registry.get("quickstart")
    stored = nested({name: one.idle for name, one in LEFT.items()}, run.to_dict())
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    assert parse_train([*TRAIN, "--config", str(tmp_path / "recipe.json")]).run == run


def test_a_stored_recipe_is_read_without_it_and_one_line_says_so(caplog):
    run = registry.get("quickstart")
    with caplog.at_level(logging.INFO):
        assert Run.from_dict(nested({n: one.idle for n, one in LEFT.items()}, run.to_dict())) == run
        assert not caplog.messages
        for _ in range(2):
            assert Run.from_dict(nested(IN_USE, run.to_dict())) == run
    (message,) = caplog.messages
    assert all(f"{name} {value!r}" in message for name, value in IN_USE.items())


def test_a_run_of_an_earlier_version_is_read(caplog):
    with caplog.at_level(logging.INFO):
        run = read_recipe(ROOT / "tests" / "stored_runs" / "time_box", where="report")
    assert run.optim.max_steps == 60
    assert [message for message in caplog.messages if "max_seconds 31.2" in message]


@pytest.mark.parametrize(
    ("decisions", "limit", "file", "steps"),
    [
        ([(20, 80), (40, 75), (60, 70)], 9.0, {"updates": 70}, 75),
        ([], 9.0, {}, None),
        # As the first release kept it, whose file says nothing of a run without a limit.
        (None, 9.0, {"updates": 70}, 70),
        (None, 0.0, {"updates": 70}, None),
    ],
)
def test_the_length_that_a_time_limit_decided(decisions, limit, file, steps):
    manifest = {"update": 50, "recipe": {"optim": {"max_seconds": limit}}}
    if decisions is not None:
        made = [{"step": step, "updates": total} for step, total in decisions]
        manifest["time_box"] = {"seconds": 5.0, "decisions": made}
    assert left.decided_steps(manifest, file) == steps
    later = {"update": 60, "recipe": {}, **left.recorded_length(60, steps)}
    assert left.decided_steps(later) == steps
