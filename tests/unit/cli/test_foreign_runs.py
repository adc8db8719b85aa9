"""A run folder made by somebody else: no command runs the code that it names, or vouches for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from PIL import Image
from stored_run import store_tensors

from fd_large import doors
from fd_large.cli.main import main
from fd_large.engine.guest import guest

ENTRY = {"model": "timm:vit_tiny_patch16_224", "source": "random"}
# Every field that takes code of the user's own, and values of the recipe that put a name there.
FIELDS = {
    "loss": lambda name: {"objective.loss": name},
    "head": lambda name: {"objective.head": name},
    "normaliser": lambda name: {"objective.normaliser": name},
    "student": lambda name: {"student.model": name, "student.architecture": {}},
    "function": lambda name: {
        "student.model": name,
        "student.architecture": {"function": name.removeprefix("module:")},
    },
    "student.init": lambda name: {"student.init": name},
    "teacher": lambda name: {"teacher.source": name, "teacher.architecture": {}},
    "teacher.model": lambda name: {"teacher.model": name, "teacher.architecture": {}},
    "teachers": lambda name: {
        "teacher": {},
        "objective": {},
        "teachers": {"a": ENTRY, "b": {**ENTRY, "head": name}},
    },
    "teachers.source": lambda name: {
        "teacher": {},
        "objective": {},
        "teachers": {"a": ENTRY, "b": {"model": "auto", "source": name}},
    },
    "students": lambda name: {
        "student": {"model": "swinv2_tiny"},
        "students": {"a": {"model": name}, "b": {"model": "swinv2_tiny"}},
    },
    "images": lambda name: {"data.root": name},
    "held out": lambda name: {"eval.root": name},
    "k-NN": lambda name: {"eval.knn_root": name},
    "task": lambda name: {"task.name": name},
    "optimiser": lambda name: {"optim.name": name},
    "tracker": lambda name: {"runtime.trackers": ["tensorboard", name]},
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    task = tiny_runs.tiny_task(tiny_runs.tiny_run())
    return {name: parameter.detach() for name, parameter in task.named_parameters()}


def foreign(
    folder: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any], name: str
) -> Path:
    """A run folder whose recipe, checkpoint and code.json all name code."""
    tree = tiny_runs.tiny_run().to_dict()
    tree["runtime"]["run_dir"] = str(folder)
    for field, value in copy.deepcopy(values).items():
        section, _, key = field.partition(".")
        if key:
            tree[section][key] = value
        elif value:
            tree[section] = value
        else:
            tree.pop(section, None)
    folder.mkdir()
    hashes = doors.hashes([name])
    store_tensors(folder, tensors, recipe=tree, facts={"code": hashes})
    tiny_runs.store_incident(folder, 3, [torch.zeros(2, 3, 32, 32)], [1.0])
    (folder / "recipe.json").write_text(json.dumps(tree))
    (folder / "deepspeed.json").write_text("{}")
    (folder / "code.json").write_text(json.dumps([{"update": 0, "files": hashes}]))
    return folder


def commands(folder: Path, out: Path) -> list[list[str]]:
    run, recipe, pictures = str(folder), str(folder / "recipe.json"), "builtin:photographs"
    images = ["--data.root", pictures]
    return [
        ["train", "--deepspeed_config", "zero3", "--config", recipe],
        ["statistics", "--deepspeed_config", "zero3", "--config", recipe, "--out", f"{out}/s"],
        ["cache", "quickstart", f"{out}/cache", "--config", recipe],
        ["plan", "--config", recipe, "--gpus", "1", "--images", "100"],
        ["report", run],
        ["runs", run, "--best", "held_out_loss"],
        ["runs", run, "--csv"],
        ["checkpoint", "list", run],
        ["checkpoint", "verify", run],
        ["checkpoint", "export", run, f"{out}/ds", "--deepspeed_config", "zero1"],
        ["weights", "inspect", run],
        ["export", run, f"{out}/fd", "--to", "fd"],
        ["export", run, f"{out}/timm", "--to", "timm"],
        ["diagnose", run, *images, "--images", "2", "--out", f"{out}/d"],
        ["diagnose", f"{run}#teacher", *images, "--images", "2", "--out", f"{out}/dt"],
        ["evaluate", run, "--task", "knn", *images, "--out", f"{out}/e"],
        ["embed", run, *images, "--out", f"{out}/e.csv"],
        ["predict", run, f"{out}/a.png", "--out", f"{out}/p"],
        ["replay", f"{run}/incidents/update_00000004"],
        ["transfer", run, "--imagenet", str(out), "--out", f"{out}/t", "--plan"],
        ["models", run],
    ]


QUICK = (("loss", "file"), ("student", "module"))


@pytest.mark.parametrize(
    ("field", "form"),
    [
        pytest.param(field, form, marks=() if (field, form) in QUICK else pytest.mark.sweep)
        for field in FIELDS
        for form in ("file", "module")
    ],
)
def test_no_command_runs_code_that_a_foreign_run_names(
    field: str,
    form: str,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    marker, evil = tmp_path / "ran", tmp_path / "evil_of_a_test.py"
    evil.write_text(f"open({str(marker)!r}, 'w').close()\ndef thing(*given, **named): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    name = f"module:{evil if form == 'file' else 'evil_of_a_test'}:thing"
    folder = foreign(tmp_path / "shared_run", tensors, FIELDS[field](name), name)
    refused = set()
    for words in commands(folder, tmp_path):
        with guest():  # A start that met the other ranks, of none, leaves nothing to the next.
            code = main(words)
        said = capsys.readouterr().err
        assert not marker.exists(), words
        if "--allow-code" in said:
            assert code == 2, words
            refused.add(words[0])
    # What finds no code on its way goes on, or finds another mistake; some command has to find it.
    assert refused


LOSS = """
open({marker!r}, "w").close()
def thing(projected, target):
    return (projected - target).abs().mean()
"""


@pytest.mark.parametrize("command", ["plan", "diagnose"])
def test_allowed_once_it_runs_until_it_changes(command, tensors, tmp_path, monkeypatch, capsys):
    marker, own = tmp_path / "ran", tmp_path / "own_loss.py"
    text = LOSS.format(marker=str(marker))
    own.write_text(text)
    name = f"module:{own}:thing"
    folder = foreign(tmp_path / "shared_run", tensors, {"objective.loss": name}, name)
    words = next(words for words in commands(folder, tmp_path) if words[0] == command)

    def runs(*more: str) -> bool:
        """A start that knows of those before what the list says."""
        doors.reset()
        marker.unlink(missing_ok=True)
        code = main([*words, *more])
        assert (code == 2) == ("--allow-code" in capsys.readouterr().err), code
        return marker.exists()

    assert not runs()
    assert runs("--allow-code", str(own))
    assert runs()
    own.write_text(text + "\n# Edited.\n")
    assert not runs()
    for refused in (tmp_path, tmp_path / "gone.py"):
        assert main([*words, "--allow-code", str(refused)]) == 2
    assert not marker.exists()
