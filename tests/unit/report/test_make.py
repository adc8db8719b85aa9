"""A whole report: pictures, summary, closing words; and what it says of a run that is not whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large.errors import ConfigError, DataError
from fd_large.recipes import registry
from fd_large.report import make
from fd_large.report.make import make_report

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    """The runs whose pages were written; test_run_page.py draws them."""
    written = []
    monkeypatch.setattr(make, "write_run_page", written.append)
    return written


def figures(text):
    """What stands beside each word of the closing text."""
    rows = text.partition("\nnext:")[0].splitlines()[1:]
    return {what.strip(): told.strip() for what, told in (row[2:].split("  ", 1) for row in rows)}


def test_the_text_and_the_summary(make_run, monkeypatch, tmp_path, pages):
    make_run()
    monkeypatch.chdir(tmp_path)
    text = make_report("runs/made_up")
    told = figures(text)
    assert text.startswith("fd_swinv2_base: done, 60 of 60 steps; runs/made_up\n")
    assert told["teacher"] == "swinv2_base from teacher.pth"
    assert told["training loss"] == "0.5000 -> 0.3033"
    assert told["held-out loss"].startswith("0.5000 -> 0.3320, 0.830 of ")
    assert told["held-out loss"].endswith(" 0.4000")
    assert told["held-out cosine"] == "-0.0010 -> 0.4300"
    assert told["unseen-crops loss"] == "0.2000"
    assert told["speed"] == "84.2 images/s on 2 CPU ranks"
    assert told["peak memory"] == "1.23 GB on the fullest rank"
    for name in ("loss_curve.png", "features.png"):
        assert (tmp_path / "runs/made_up/pictures" / name).stat().st_size > 10_000
    summary = json.loads((tmp_path / "runs/made_up/summary.json").read_text())
    assert summary["status"] == "done"
    assert next(iter(summary.items())) == ("better_than_constant", True)
    commands = [step["command"] for step in summary["next"]]
    assert commands[0].endswith(
        "deepspeed --num_accelerators 2 fd_large/train.py --deepspeed_config z.json"
        " --data.root FOLDER --eval.root HELD_OUT_FOLDER --runtime.run_dir runs/made_up-2"
    )
    assert any(line.endswith("tensorboard --logdir runs/made_up/events") for line in commands)
    assert make_report("runs/made_up") == text, "once more changes nothing"
    assert [page.summary["next"] for page in pages] == [summary["next"]] * 2


def test_a_random_teacher_is_said_and_the_command_comes_again(make_run):
    words = ["--fresh", "--optim.betas", "0.9", "0.95", "--data.root=x", "--runtime.run_dir", "x"]
    text = make_report(make_run(source="random", words=words))
    assert "swinv2_base with RANDOM weights" in text
    assert " z.json --optim.betas 0.9 0.95 --data.root FOLDER --eval.root " in text


def test_a_run_that_is_not_of_this_version_is_told_by_the_names_on_disk(make_run):
    folder = make_run()
    (folder / "environment.json").write_text("{}")
    told = figures(make_report(folder))
    assert told["held out loss"].startswith("0.5000 -> 0.3320, 0.830 of ")
    assert told["unseen crops loss"] == "0.2000"


@pytest.mark.parametrize("saved", [(), (8, 16)])
@pytest.mark.parametrize("status", ["stopped", None])
def test_a_run_that_is_not_finished_can_go_on(status, saved, make_run):
    folder = make_run(
        status=status, updates=20, held_out=False, words=["--fresh", "--eval.every=5"]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 20, "lo')
    for step in saved:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    for other in ("step_00000020.a1.part", "damaged_step_00000018"):
        (folder / "checkpoints" / other).mkdir(parents=True)
    text = make_report(folder)
    assert "20 of 60 steps" in text or "not finished, 20 steps" in text
    assert ("go on from the last checkpoint (16 steps):" in text) == bool(saved)
    assert ("no checkpoint is stored yet" in text) == (not saved)
    assert ("summary.json" in figures(text)["numbers, logs"]) == (status is not None)
    assert "--deepspeed_config z.json --eval.every=5\n" in text
    assert "held-out" not in text
    assert (folder / "summary.json").exists() == (status is not None)


def test_a_run_that_somebody_trains_is_not_started_twice(make_run):
    folder = make_run(status="preempted", updates=20)
    before = (folder / "summary.json").read_bytes()
    text = make_report(folder, running=True)
    assert "running, 20 steps" in text
    assert "train.py" not in text
    assert (folder / "summary.json").read_bytes() == before


def test_what_was_measured_before_the_end_says_when(make_run):
    folder = make_run(status="preempted", updates=20)
    rows = [{"update": 0, "held_out_loss": 0.5, "held_out_best_constant": 0.4}]
    (folder / "evaluations.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert figures(make_report(folder))["held-out loss"].startswith("0.5000 before training, 1.250")
    rows.append({"update": 10, "held_out_loss": 0.3})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = figures(make_report(folder))["held-out loss"]
    assert told.startswith("0.5000 -> 0.3000 after step 10, ")


def test_why_a_run_ended_and_a_path_with_a_blank(make_run):
    folder = make_run(name="a run", status="failed")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "reason": "no such card"}))
    text = make_report(folder)
    assert figures(text)["why it ended"] == "no such card"
    assert f"--logdir '{folder}/events'" in text


def test_no_run_and_a_damaged_file_are_one_sentence(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere"):
        make_report(tmp_path / "nowhere")
    folder = make_run()
    (folder / "metrics.jsonl").write_text("{}{\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        make_report(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"update": 0, "loss": "\xff"}\n'),
        ("metrics.jsonl", b"[1, 2]\n"),
        ("metrics.jsonl", b'{"update": null, "loss": 1, "learning_rate": 1}\n'),
        ("metrics.jsonl", b'{"update": 0, "loss": "x", "learning_rate": 1}\n'),
        ("evaluations.jsonl", b'{"update": null}\n'),
        ("summary.json", b"[1]"),
        ("summary.json", b'{"best": "x"}'),
        ("recipe.json", b"[]"),
        ("recipe.json", b"{}"),
        ("recipe.json", b'"\xff"'),
        *((name, b"[" * 100_000) for name in ("recipe.json", "summary.json", "environment.json")),
        *((name, b"[" * 100_000 + b"\n") for name in ("metrics.jsonl", "evaluations.jsonl")),
    ],
)
def test_what_no_run_writes_is_told_in_one_sentence(name, content, make_run):
    folder = make_run()
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^report: .*{name}.*; got "):
        make_report(folder)


def test_a_folder_that_cannot_be_written_is_reported_all_the_same(make_run):
    folder = make_run(features=())
    (folder / "pictures").rmdir()
    (folder / "pictures").write_text("in the way")
    text = make_report(folder)
    assert figures(text)["held-out cosine"] == "-0.0010 -> 0.4300"
    assert text.splitlines()[-1].startswith("pictures and page: NOT WRITTEN: ")
    assert "next" not in json.loads((folder / "summary.json").read_text())


def test_it_needs_no_torch_where_no_export_is_offered(make_run):
    lines = (
        "import sys; from fd_large.report.make import make_report; make_report(sys.argv[1]);"
        "print([m for m in ('torch', 'deepspeed', 'tensorboard') if m in sys.modules])"
    )
    command = [sys.executable, "-c", lines, str(make_run(status="preempted"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_a_task_without_teacher_whose_numbers_are_no_losses(make_run):
    folder = make_run(held_out=False, features=())
    recipe = registry.get("coco_mask_rcnn_swinv2_tiny").to_dict()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "environment.json").write_text('{"metrics": {"box/AP": "box AP"}}')
    numbers = {"box_AP": 0.482, "box_AP50": 0.69, "mask_AP": 0.425}
    (folder / "evaluations.jsonl").write_text(json.dumps({"update": 60} | numbers) + "\n")
    told = figures(make_report(folder))
    assert told["box AP"] == "0.4820"
    assert "teacher" not in told
    assert not [what for what in told if "mask" in what or "AP50" in what], "not listed"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("summary.json", {"status": ["done"]}),
        ("summary.json", {"images_per_second": "fast"}),
        ("environment.json", {"metrics": [1]}),
        ("environment.json", {"metrics": {"loss": None}}),
        ("environment.json", {"command": [1]}),
        ("environment.json", {"packages": "torch"}),
    ],
)
def test_values_of_kinds_that_no_run_writes_are_told_in_one_sentence(name, values, make_run):
    file = make_run() / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(DataError, match=next(iter(values))):
        make_report(file.parent)


def test_fields_that_are_null_are_as_absent_ones(make_run):
    folder = make_run()
    for file in (folder / "summary.json", folder / "environment.json"):
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()))))
    assert "not finished" in make_report(folder)


def test_what_commands_a_terminal_and_halves_of_letters_are_not_said(make_run):
    folder = make_run(status="\x1b[2J\ud800", root="x\x1b]0;y\x07")
    told = make_report(folder)
    assert told.replace("\n", "").isprintable()
    told.encode()


def test_no_file_elsewhere_is_drawn_over(make_run, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    picture = make_run() / "pictures" / "loss_curve.png"
    picture.symlink_to(theirs)
    make_report(picture.parents[1])
    assert theirs.read_text() == "theirs"
    assert picture.stat().st_size > 10_000
