"""HTC++ on the giant, in small, through a run's whole life: killed, resumed, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import detection_twin
import pytest
from dense_runs import (
    check_kill_and_resume,
    evaluate,
    evaluations,
    flags_of,
    scores,
    scores_in,
    train,
)
from launch import ROOT, run_ranks

PROGRAMS = Path(__file__).parent / "programs"
FLAGS = f"""
{detection_twin.FLAGS} --eval.every 2 --task.detection.box_loss giou
--task.detection.heads htc --task.detection.extra_attention True
"""
flags = flags_of(FLAGS, micro_batch_size=1)
# A run that waits for the figures of each evaluation.
waiting = flags_of(f"{FLAGS} --eval.best_metric box_AP", micro_batch_size=1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection_twin.pictures(tmp_path_factory.mktemp("coco"))


def test_killed_resumed_and_evaluated(coco: Path, tmp_path: Path) -> None:
    """It makes three steps while what was found after two is not scored, and is killed then."""
    calm, killed = train(waiting, coco, tmp_path / "calm", ranks=2), tmp_path / "killed"
    check_kill_and_resume(flags, coco, calm, killed, PROGRAMS / "held_scores.py")
    assert [row["update"] for row in evaluations(killed)] == [2, 4, 5]

    summary = json.loads((killed / "summary.json").read_text())
    in_run = scores_in(killed)
    assert summary["box_AP"] == in_run["box"]["numbers"]["AP"]
    out = tmp_path / "out"
    finished = evaluate(killed, coco, out, ranks=2)
    assert "AP50" in finished.outputs[0]
    assert not any("AP50" in output for output in finished.outputs[1:])
    by_hand = scores(out)
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
