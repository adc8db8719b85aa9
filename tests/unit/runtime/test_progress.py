"""A bar on a terminal, plain lines elsewhere, and only numbers that were read already."""

import io
import logging
import re

import pytest
from rich.console import Console

from fd_large.ranks import activity
from fd_large.runtime import logs, progress, terminal
from fd_large.runtime.meter import Meter
from fd_large.runtime.progress import Progress


@pytest.fixture
def shown(monkeypatch):
    """The text on a terminal (or in a pipe) of a width, without its control codes."""

    class Shown:
        def open(self, *, is_terminal, width=100):
            self.stream = io.StringIO()
            self.console = Console(
                file=self.stream, force_terminal=is_terminal, width=width, legacy_windows=False
            )
            monkeypatch.setattr(terminal, "console", lambda: self.console)

        def text(self):
            return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.stream.getvalue())

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(terminal, "before_errors", [])
    logs.start(0)
    yield Shown()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def hooks():
    return [Meter([Progress()])]


def test_plain_lines_where_there_is_no_terminal(shown, make_setting, run_updates):
    shown.open(is_terminal=False)
    run_updates(hooks(), make_setting(), 10, evaluate=(4,))
    lines = shown.text().splitlines()
    assert len(lines) == 4
    assert re.search(
        r"step 4/10  epoch 0  loss 0.03000  grad norm 1.500  lr 0.001  .* images/s  "
        r"data wait 0.0%  .* GB  0:0. left",
        lines[0],
    )
    assert "after 4 steps: held-out loss 4.0000" in lines[1]
    assert "━" not in shown.text()


def test_each_of_several_teachers_has_a_line_of_its_own(shown, make_setting):
    shown.open(is_terminal=False)
    whole = {"held_out/loss": "held-out loss", "held_out/cosine": "held-out cosine"}
    parts = {
        key.replace("/", f"/{part}_"): f"{words} ({part})"
        for part in ("clip", "dino")
        for key, words in whole.items()
    }
    hook = Progress()
    words = {**whole, "test/knn": "test k-NN accuracy (%)", **parts}
    hook.on_start(make_setting(metrics=words))
    hook.on_evaluation(4, {key.replace("/", "_"): 0.25 for key in words})
    lines = [line.split("  ", 1)[1] for line in shown.text().splitlines()]
    numbers = "held-out loss 0.2500, cosine 0.2500"
    assert lines == [
        f"after 4 steps: {numbers}; test k-NN accuracy (%) 0.2500",
        f"  clip: {numbers}",
        f"  dino: {numbers}",
    ]


def test_parts_without_their_whole_are_in_the_first_line(shown, make_setting):
    shown.open(is_terminal=False)
    words = {
        "held_out/loss": "held-out loss",
        "held_out/clip_loss": "held-out loss (clip)",
        "other/clip_loss": "held-out loss (clip)",
    }
    hook = Progress()
    hook.on_start(make_setting(metrics=words))
    parts = {"held_out_clip_loss": 0.25, "other_clip_loss": 0.5}
    hook.on_evaluation(4, parts)
    hook.on_evaluation(5, {"held_out_loss": 1.0, **parts})
    lines = [line.split("  ", 1)[1] for line in shown.text().splitlines()]
    assert lines == [
        "after 4 steps: held-out loss (clip) 0.2500, loss (clip) 0.5000",
        "after 5 steps: held-out loss 1.0000",
        "  clip: held-out loss 0.2500, loss 0.5000",
    ]


def test_a_bar_on_a_terminal_with_held_out_numbers_above(shown, make_setting, run_updates):
    shown.open(is_terminal=True)
    run_updates(hooks(), make_setting(), 10, evaluate=(4,))
    text = shown.text()
    assert "after 4 steps: held-out loss 4.0000" in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("made_up ━")
    assert re.search(r"10/10 loss 0.0900  lr 0.001  [0-9.]+ images/s done", last)
    # The lines of the log are in the file only.
    assert "grad norm" not in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_bar_fits_its_terminal(width, shown, make_setting, run_updates):
    shown.open(is_terminal=True, width=width)
    run_updates(hooks(), make_setting(total=187_500, log_every=1), 3)
    for line in shown.text().splitlines():
        assert len(line.split("\r")[-1]) <= width
    assert "images/s" in shown.text().splitlines()[-1]


def test_a_failure_is_told_below_the_bar(shown, make_setting, run_updates, capsys):
    shown.open(is_terminal=True)
    run_updates(hooks(), make_setting(), 3, end=None)
    assert not shown.text().endswith("\n")
    terminal.show_error("data.root: gone")
    assert shown.text().endswith("\n")
    assert capsys.readouterr().err == "data.root: gone\n"


def test_what_is_done_between_two_steps_takes_the_place_of_the_numbers(
    shown, make_setting, run_updates, monkeypatch
):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    shown.open(is_terminal=True)
    used = hooks()
    run_updates(used, make_setting(), 8, end=None)
    assert terminal.is_claimed(), "no other bar beside it"
    assert activity.current()[-1].done == 8
    with activity.work("evaluation"):
        for _ in activity.counted("ab", "test images", "batches"):
            pass
    assert "test images, 1 of 2 batches" in shown.text()
    used[0].on_end("done")
    assert "loss 0.0700" in shown.text().rstrip().splitlines()[-1]
    assert not terminal.is_claimed()


def test_many_small_parts_after_the_last_step_do_not_draw_each(
    shown, make_setting, run_updates, monkeypatch
):
    shown.open(is_terminal=True)
    used = hooks()
    run_updates(used, make_setting(total=8), 8, end=None)
    assert "8/8" in shown.text(), "the last step is drawn at once"
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DRAWINGS", 1e9)
    drawings = shown.text().count("\r")
    for _ in activity.counted(range(100), "test images", "batches"):
        pass
    # The numbers stand there again at their end.
    assert shown.text().count("\r") == drawings + 1
    used[0].on_end("done")
