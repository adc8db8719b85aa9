"""The giant's detector in small through a run's whole life: killed, resumed, evaluated."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from detection_twin import pictures, words
from kills import resumed_from, state, updates_done
from launch import ROOT, run_ranks, start_ranks
from twin import TRAIN, losses

UPDATES = 5


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("coco"))


def test_killed_resumed_and_evaluated(coco: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run_ranks(TRAIN, *words(coco, calm, UPDATES), ranks=2, timeout=240)
    started = start_ranks(TRAIN, *words(coco, killed, UPDATES), ranks=2)
    try:
        deadline = time.monotonic() + 180
        while updates_done(started) < 3:
            assert time.monotonic() < deadline, "".join(started.outputs())
            assert started.processes[0].poll() is None, "".join(started.outputs())
            time.sleep(0.02)
    finally:
        started.kill()
    again = start_ranks(TRAIN, *words(coco, killed, UPDATES), ranks=2)
    try:
        assert [process.wait(timeout=240) for process in again.processes] == [0, 0]
        assert 0 < resumed_from(again) < UPDATES
    finally:
        again.kill()
    assert losses(killed) == losses(calm)
    first, second = state(calm, UPDATES), state(killed, UPDATES)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.equal(second[name]), name

    summary = json.loads((killed / "summary.json").read_text())
    in_run = json.loads((killed / f"evaluations/update_{UPDATES:08d}/scores.json").read_text())
    assert summary["box_AP"] == in_run["box"]["numbers"]["AP"]
    out = tmp_path / "out"
    finished = run_ranks(
        *(ROOT / "fd_large/__main__.py", "evaluate", killed),
        *("--data.root", coco, "--out", out),
        ranks=2,
    )
    assert "AP50" in finished.outputs[0]
    assert not any("AP50" in output for output in finished.outputs[1:])
    by_hand = json.loads((out / "scores.json").read_text())
    for kind in ("box", "mask"):
        assert by_hand[kind]["numbers"] == pytest.approx(in_run[kind]["numbers"], abs=1e-3)
    assert {path.name for path in out.glob("*.png")} >= {"chosen.png", "curves.png"}

    picture = next((coco / "val2017").iterdir())
    told = run_ranks(
        *(ROOT / "fd_large/__main__.py", "predict", killed, picture),
        *("--out", tmp_path / "seen", "--score", "0"),
        ranks=1,
    )
    assert "objects" in told.outputs[0]
    seen = json.loads((tmp_path / "seen/predictions.json").read_text())
    assert list(seen) == [str(picture)]
    assert all(len(one["bbox"]) == 4 for one in seen[str(picture)])
