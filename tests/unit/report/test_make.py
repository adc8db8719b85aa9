"""A whole report: pictures, summary, closing words; and what it says of a run that is not whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large.errors import DataError
from fd_large.recipes import registry
from fd_large.report.make import make_report

ROOT = Path(__file__).resolve().parents[3]


def test_the_text_and_the_summary(make_run, monkeypatch, tmp_path):
    make_run()
    monkeypatch.chdir(tmp_path)
    text = make_report("runs/made_up").splitlines()
    told = dict(line.strip().split("  ", 1) for line in text[1:9] if "  " in line.strip())
    told = {what: figure.strip() for what, figure in told.items()}
    assert text[0] == "fd_swinv2_base: done, 60 of 60 steps; runs/made_up"
    assert told["teacher"] == "swinv2_base from teacher.pth"
    assert told["training"] == "loss 0.5000 -> 0.3033"
    assert told["held-out"] == "loss 0.5000 -> 0.3320, 0.830 of the best constant's 0.4000"
    assert text[4].strip() == "cosine 0.00 -> 0.43"
    assert told["unseen crops"] == "loss 0.2000 -> 0.2000"
    assert told["speed"] == "84.2 images/s on 2 CPU ranks"
    assert told["peak memory"] == "1.23 GB on the fullest rank"
    for name in ("loss_curve.png", "features.png"):
        assert (tmp_path / "runs/made_up/pictures" / name).stat().st_size > 10_000
    summary = json.loads((tmp_path / "runs/made_up/summary.json").read_text())
    assert summary["status"] == "done"
    commands = [step["command"] for step in summary["next"]]
    assert commands[0].endswith(
        "deepspeed --num_accelerators 2 fd_large/train.py --deepspeed_config z.json"
        " --data.root FOLDER --runtime.run_dir runs/made_up-2"
    )
    assert commands[1].endswith("tensorboard --logdir runs/made_up/events")
    # Once more changes nothing.
    assert make_report("runs/made_up").splitlines() == text


def test_a_random_teacher_is_said(make_run):
    words = ["--fresh", "--teacher.source=random", "--optim.betas", "0.9", "0.95"]
    text = make_report(make_run(source="random", words=[*words, "--runtime.run_dir", "x"]))
    assert "swinv2_base with RANDOM weights: shows the machinery works" in text
    again = next(line for line in text.splitlines() if "--teacher.source" in line)
    assert "--optim.betas 0.9 0.95 --teacher.source FILE --runtime.run_dir" in again
    assert "source=random" not in again
    assert "--fresh" not in text


@pytest.mark.parametrize("status", ["stopped", None])
def test_a_run_that_is_not_finished_can_go_on(status, make_run):
    folder = make_run(
        status=status, updates=20, held_out=False, words=["--fresh", "--eval.every=5"]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 20, "lo')
    text = make_report(folder)
    assert "20 of 60 steps" in text or "not finished, 20 steps" in text
    assert "go on from the last checkpoint" in text
    assert "--deepspeed_config z.json --eval.every=5\n" in text
    assert "held-out" not in text
    assert (folder / "summary.json").exists() == (status is not None)


def test_no_run_and_a_damaged_file_are_one_sentence(make_run, tmp_path):
    with pytest.raises(DataError, match=r"no run here; got .*nowhere"):
        make_report(tmp_path / "nowhere")
    folder = make_run()
    (folder / "metrics.jsonl").write_text("{}{\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl is damaged"):
        make_report(folder)


def test_it_needs_no_torch(make_run):
    lines = (
        "import sys; from fd_large.report.make import make_report; make_report(sys.argv[1]);"
        "print([m for m in ('torch', 'deepspeed', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, str(make_run())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_detector_s_precision_and_what_to_do_with_it(make_run):
    folder = make_run(held_out=False, features=())
    recipe = registry.get("coco_mask_rcnn_swinv2_tiny").to_dict()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    numbers = {"box_AP": 0.482, "box_AP50": 0.69, "mask_AP": 0.425, "mask_AP50": 0.66}
    (folder / "evaluations.jsonl").write_text(json.dumps({"update": 60} | numbers) + "\n")
    text = make_report(folder)
    assert "box AP           48.2, AP50 69.0" in text
    assert "mask AP          42.5, AP50 66.0" in text
    assert f"-m fd_large predict {folder} IMAGE" in text
