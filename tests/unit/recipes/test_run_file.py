"""Fields from a YAML or JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fd_large.cli.train import parse_train
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.run_file import Given, read_run_file, run_of

YAML = """\
name: fd_clip_vit_base
optim:
  base_lr: 1e-4
  max_steps: 20
  betas: [0.9, 0.95]
engine:
  compile: off
data.workers: 0
student:
  architecture: {drop_path: null}
"""


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def train(*flags: str):
    return parse_train(["--deepspeed_config", "zero1", *flags]).run


def said(path: str, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        train("--config", path, *flags)
    return str(caught.value).splitlines()


def test_a_file_changes_the_recipe_that_it_names_and_flags_win(tmp_path):
    text = YAML.partition("student:")[0]
    run = train("--config", written(tmp_path, text), "--optim.max_steps", "30")
    base = registry.get("fd_clip_vit_base")
    expected = {
        "optim.base_lr": 1e-4,
        "optim.max_steps": 30,
        "optim.betas": (0.9, 0.95),
        "data.workers": 0,
    }
    assert run == base.with_fields(expected)
    # The name of the command line is the recipe that the file changes.
    other = train("--config", str(tmp_path / "run.yaml"), "--recipe", "fd_dino_vit_base")
    assert (other.name, other.optim.base_lr) == ("fd_dino_vit_base", 1e-4)


@pytest.mark.parametrize("name", sorted(registry.RECIPES))
def test_every_recipe_json_is_such_a_file(tmp_path, name):
    run = registry.get(name)
    text = json.dumps(run.to_dict(), indent=1)
    for file in ("recipe.json", "recipe.yaml"):
        assert run_of(read_run_file(written(tmp_path, text, file)), recipe="quickstart") == run


def test_yaml_is_read_as_json_would_be(tmp_path):
    given = read_run_file(written(tmp_path, YAML))
    assert given.values["engine"]["compile"] == "off"
    assert given.values["optim"]["base_lr"] == 1e-4
    assert given.values["student"]["architecture"]["drop_path"] is None


def test_mistakes_are_told_at_once_with_file_and_line(tmp_path):
    text = YAML.replace("base_lr: 1e-4", "base_rl: 1e-4").replace("workers: 0", "workers: -1")
    path = written(tmp_path, text)
    found = said(path, "--optim.max_stpes", "3")
    expected = [
        f"{path}:3: optim.base_rl: no such field; nearest: optim.base_lr",
        f"{path}:10: student.architecture.drop_path: no such field; nearest: ",
        f"{path}:8: data.workers: too small; got -1, expected 0 or more processes. Change --data",
        "--optim.max_stpes: unknown flag; nearest: --optim.max_steps",
    ]
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_whoever_takes_the_mistakes_has_the_run_without_them():
    given, mistakes = Given({"optim": {"base_rl": 1.0, "max_steps": 3}}), []
    with pytest.raises(ConfigError, match=r"optim\.base_rl"):
        run_of(given, recipe="fd_clip_vit_base")
    run = run_of(given, recipe="fd_clip_vit_base", mistakes=mistakes)
    assert run.optim.max_steps == 3
    assert ["optim.base_rl" in line for line in mistakes] == [True]


def test_what_is_no_run_file_is_refused_in_a_sentence(tmp_path):
    assert said(str(tmp_path / "none"))[0].startswith(f"--config: {tmp_path / 'none'}: ")
    for text, what in (
        ("- 1\n", ": not fields of a recipe; got list"),
        ("a: [1\nb: 2\n", ":2: neither YAML nor JSON"),
        ('{"optim": {"max_steps": ' + "1" * 5000 + "}}", ": neither YAML nor JSON"),
        ("a: !!timestamp 2001-99-99\n", ": neither YAML nor JSON"),
        ("optim: !!python/object/apply:os.system [ls]\n", ":1: neither YAML nor JSON"),
        ("optim:\n  max_steps: 1\n  max_steps: 2\n", ":3: optim.max_steps: given twice"),
        ("name: fd_clip\n", ":1: name: "),
    ):
        path = written(tmp_path, text)
        assert said(path)[0].startswith(path + what)


def test_a_few_lines_do_not_stand_for_millions(tmp_path):
    levels = (f"a{n + 1}: &a{n + 1} {{x: *a{n}, y: *a{n}}}" for n in range(30))
    path = written(tmp_path, "\n".join(["a0: &a0 {x: 1}", *levels]))
    (line,) = said(path)
    assert line.startswith(f"{path}:")
    assert "got more than 10,000 names" in line


def test_a_run_of_its_own_says_its_model_and_has_its_name(tmp_path):
    text = "name: mine\nstudent: {model: vit_base_patch16}\noptim:\n"
    run = train("--config", written(tmp_path, text))
    assert (run.name, run.run_dir()) == ("mine", "runs/mine")


def test_code_that_a_file_names_is_not_imported(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("raise SystemExit('imported')")
    values = {"name": "mine", "student.model": "vit_base_patch16", "task.name": f"module:{code}:T"}
    run = run_of(Given(values), recipe="quickstart")
    assert run is not None
    assert run.task.kind() is None
