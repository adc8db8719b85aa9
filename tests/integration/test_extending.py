"""The examples of docs/extending.md, as they stand there, in runs that are killed and resumed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from kills import state
from launch import ROOT, Finished, run_ranks
from twin import TRAIN, losses

from fd_large import doors

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
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
    for line in re.findall(r"^    .*?(--\S+ .*module:.*)$", PAGE, re.MULTILINE):
        if any(f"module:{name}" in line for name in names):
            found += line.split()
    found = found[found.index("--objective.loss") :] if "--deepspeed_config" in found else found
    return [word.replace("module:", f"module:{folder}/") for word in found]


def train(folder: Path, run: Path, given: list[str], *, ranks: int, config: str, kill=False):
    tail = [*TINY.split(), "--runtime.run_dir", str(run)]
    trackers = [f"module:{folder}/lines.py:Csv", f"module:{folder}/killer.py:Killer"]
    return run_ranks(
        TRAIN,
        *("--deepspeed_config", ROOT / f"ds_configs/{config}.json"),
        *(*given, *tail, "--runtime.trackers", *trackers),
        ranks=ranks,
        env={"KILL": "1"} if kill else {},
        check=not kill,
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
    assert len(EXAMPLES) == 8
    for name, text in EXAMPLES.items():
        assert len(text.splitlines()) < LINES, name
        compile(text, name, "exec")
    for name in EXAMPLES:
        assert f"module:{name}:" in PAGE


def test_loss_head_normaliser_backbone_source_optimiser_and_tracker(own, tmp_path):
    names = ("cosine.py", "head.py", "unit.py", "convnet.py", "arrays.py", "lion.py")
    given = flags(own, *names)
    assert sum("module:" in word for word in given) == len(names) + 1  # Two are the backbone.
    whole, killed, finished = twice(own, tmp_path, given, ranks=2, config="zero3")
    assert "resumed after step" in finished.outputs[0]
    assert_same(whole, killed)
    stored = state(whole, STEPS)
    assert {name.partition(".")[0] for name in stored} == {"master", "ema", "momentum"}
    assert {"master.projection.2.bias", "momentum.student.layers.0.wide.weight"} <= stored.keys()
    assert losses(whole)[-1] < losses(whole)[0]
    manifest = json.loads((whole / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    files = {Path(doors.file_of(source)).name for source in manifest["code"]}
    assert files == {*names, "lines.py", "killer.py"}


def test_task(own, tmp_path):
    student = ("--student.model", f"module:{own}/convnet.py:ConvNet")
    given = [*flags(own, "colour.py", "arrays.py"), *student]
    whole, killed, _ = twice(own, tmp_path, given, ranks=1, config="zero1")
    assert_same(whole, killed)
    recipe = json.loads((whole / "recipe.json").read_text())
    assert recipe["task"]["colour"] == {"weight": 0.5}
    assert recipe["teacher"]["source"] == ""
