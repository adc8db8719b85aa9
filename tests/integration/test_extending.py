"""The examples of docs/extending.md, as they stand there, in runs that are killed and resumed."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from closeness import distance
from kills import state
from launch import ROOT, Finished, run_ranks
from page_examples import EXAMPLES, PAGE
from twin import TRAIN, losses

from fd_large import doors
from fd_large.cli.main import main

LINES = 40
STEPS = 8

# Kills its own rank in the third step after the first save, once.
KILLER = """
import os, signal, time
from fd_large.runtime.hooks import Tracker

class Killer(Tracker):
    def on_start(self, setting):
        self.folder, self.armed = setting.folder, setting.first_update == 0

    def on_step(self, update):
        if self.armed and "KILL" in os.environ and update.index == 4:
            saved = self.folder / "checkpoints" / "step_00000002" / "manifest.json"
            while not saved.exists():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
"""
TINY = f"""
--data.image_size 32 --data.workers 1 --eval.root= --batch.global_batch_size 8
--batch.micro_batch_size 2 --optim.max_steps {STEPS} --optim.warmup_epochs 0 --optim.ema_decay 0.9
--runtime.save_every 2 --runtime.log_every 1 --runtime.keep_last 9
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder outside of the package with the files of the page."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in {**EXAMPLES, "killer.py": KILLER}.items():
        (folder / name).write_text(text)
    return folder


def flags(folder: Path, *names: str) -> list[str]:
    """The flags that the page has for the examples, but for the tracker's."""
    found: list[str] = []
    for line in re.findall(r"^(?:    |deepspeed ).*?(--\S+ .*module:.*)$", PAGE, re.MULTILINE):
        if any(f"module:{name}" in line for name in names):
            found += line.split()
    found = found[found.index("--objective.loss") :] if "--deepspeed_config" in found else found
    return [word.replace("module:", f"module:{folder}/") for word in found]


def train(
    folder: Path, run: Path, given: list[str], *, ranks: int, config: str, kill=False, check=True
) -> Finished:
    tail = [*TINY.split(), "--runtime.run_dir", str(run)]
    trackers = [f"module:{folder}/lines.py:Csv", f"module:{folder}/killer.py:Killer"]
    return run_ranks(
        TRAIN,
        *("--deepspeed_config", ROOT / f"ds_configs/{config}.json"),
        *(*given, *tail, "--runtime.trackers", *trackers),
        ranks=ranks,
        env={"KILL": "1"} if kill else {},
        check=check and not kill,
    )


def twice(folder: Path, tmp_path: Path, given: list[str], **how) -> tuple[Path, Path, Finished]:
    """A run to its end, and one that was killed and resumed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(folder, whole, given, **how)
    assert train(folder, killed, given, **how, kill=True).returncodes[0] == -9
    return whole, killed, train(folder, killed, given, **how)


def assert_same(whole: Path, killed: Path) -> None:
    assert losses(whole) == losses(killed)
    first, second = state(whole, STEPS), state(killed, STEPS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    rows = [list(csv.reader((run / "metrics.csv").open())) for run in (whole, killed)]
    assert rows[0] == rows[1]
    assert [int(row[0]) for row in rows[0]] == list(range(STEPS))


def test_the_examples_are_short_and_complete():
    assert len(EXAMPLES) == 9
    for name, text in EXAMPLES.items():
        assert len(text.splitlines()) < LINES, name
        compile(text, name, "exec")
    for name in EXAMPLES:
        assert f"module:{name}:" in PAGE


NAMES = ("cosine.py", "unit.py", "convnet.py", "arrays.py", "lion.py")


@pytest.fixture(scope="module")
def distilled(own, tmp_path_factory) -> Path:
    """A run with all examples but head and task."""
    given = flags(own, *NAMES)
    assert sum("module:" in word for word in given) == len(NAMES) + 1  # Two are the backbone.
    whole, killed, finished = twice(
        own, tmp_path_factory.mktemp("runs"), given, ranks=2, config="zero3"
    )
    assert "resumed after step" in finished.outputs[0]
    assert_same(whole, killed)
    return whole


def test_loss_normaliser_backbone_source_optimiser_and_tracker(distilled):
    stored = state(distilled, STEPS)
    assert {name.partition(".")[0] for name in stored} == {"master", "ema", "momentum"}
    assert {"master.projection.bias", "momentum.student.layers.0.wide.weight"} <= stored.keys()
    assert losses(distilled)[-1] < losses(distilled)[0]
    manifest = json.loads((distilled / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    files = {Path(doors.file_of(source)).name for source in manifest["code"]}
    assert files == {*NAMES, "lines.py", "killer.py"}


def test_task(own, tmp_path):
    student = ("--student.model", f"module:{own}/convnet.py:ConvNet")
    given = [*flags(own, "colour.py", "arrays.py"), *student]
    whole, killed, _ = twice(own, tmp_path, given, ranks=1, config="zero1")
    assert_same(whole, killed)
    recipe = json.loads((whole / "recipe.json").read_text())
    assert recipe["task"]["colour"] == {"weight": 0.5}
    assert recipe["teacher"]["source"] == ""


@pytest.mark.closeness
def test_head_and_any_number_of_ranks(own, tmp_path):
    given = flags(own, "head.py", "convnet.py", "arrays.py")
    whole, killed, _ = twice(own, tmp_path, given, ranks=1, config="zero2")
    assert_same(whole, killed)
    assert "master.projection.2.bias" in state(whole, STEPS)
    other = [*given, "--student.activation_checkpointing", "every"]
    train(own, tmp_path / "other", other, ranks=2, config="zero3")
    assert distance(losses(tmp_path / "other"), losses(whole)) <= 1e-6
    first, second = state(whole, STEPS), state(tmp_path / "other", STEPS)
    for name, tensor in first.items():
        assert distance(second[name][: len(tensor)], tensor) <= 5e-6, name


def test_a_student_is_exported_measured_and_fine_tuned(own, distilled, tmp_path, capsys):
    code, out, data = own / "convnet.py", tmp_path / "out", f"module:{own}/arrays.py:Arrays"
    export = ["export", str(distilled), str(out), "--to", "fd"]
    assert main(export) == 2
    assert f"--allow-code {code}" in capsys.readouterr().err
    assert not doors._modules
    assert main([*export, "--allow-code", str(code)]) == 0
    config = json.loads((out / "config.json").read_text())["fd_large"]
    assert config["architecture"]["function"] == "convnet.py:ConvNet"
    assert config["code_sha256"] == hashlib.sha256(code.read_bytes()).hexdigest()
    assert str(own) not in (out / "README.md").read_text()

    # An export is used with the file beside the current folder; or under another name of it.
    named = f"module:{code}:ConvNet={out}"
    measured = tmp_path / "measured"
    words = ["--data.root", data, "--out", str(measured), "--data.workers", "0", "--k", "3"]
    assert main(["evaluate", str(distilled), named, "--task", "knn", *words]) == 0
    rows = json.loads((measured / "summary.json").read_text())["nets"]
    assert len(rows) == 2
    assert rows[0]["accuracy"] == rows[1]["accuracy"]

    tuned = tmp_path / "tuned"
    given = [
        *("--recipe", "finetune_clip_vit_base", "--student.init", str(distilled)),
        *("--student.model", f"module:{code}:ConvNet", "--data.root", data),
    ]
    refused = train(own, tuned, given, ranks=1, config="zero1", check=False)
    assert refused.returncodes == [2]
    assert "optim.layer_decay" in refused.outputs[0]
    train(own, tuned, [*given, "--optim.layer_decay", "1"], ranks=1, config="zero1")
    assert len(losses(tuned)) == STEPS


def test_a_stored_run_imports_nothing(own, distilled, tmp_path, capsys):
    assert main(["report", str(distilled)]) == 0
    assert main(["checkpoint", "list", str(distilled)]) == 0
    look = ["evaluate", str(distilled), "--task", "knn", "--data.root", str(tmp_path)]
    assert main(look) == 2
    assert f"--allow-code {own}/convnet.py" in capsys.readouterr().err
    assert not doors._modules


@pytest.mark.parametrize("field", ["student.model", "data.root", "task.name"])
def test_a_file_that_is_another_or_gone(own, distilled, tmp_path, capsys, field):
    run, (section, key) = tmp_path / "run", field.split(".")
    shutil.copytree(distilled, run)
    recipe = json.loads((run / "recipe.json").read_text())
    for file in (own / "killer.py", own / "gone.py"):
        recipe[section][key] = f"module:{file}:Killer"
        (run / "recipe.json").write_text(json.dumps(recipe))
        assert main(["report", str(run)]) == 0
        if field != "data.root":  # An export does without the images.
            assert main(["export", str(run), str(tmp_path / "out"), "--to", "fd"]) == 2
            assert f"{field}: " in capsys.readouterr().err
    assert not doors._modules
    for name in ("killer.py:Killer", "gone.py:Killer"):
        given = [*flags(own, *NAMES), f"--{field}", f"module:{own}/{name}"]
        refused = train(own, distilled, given, ranks=1, config="zero3", check=False)
        assert refused.returncodes == [2]
        assert f"{field}: " in refused.outputs[0]
        assert "Traceback" not in refused.outputs[0]
