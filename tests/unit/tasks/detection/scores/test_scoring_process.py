"""The process that scores, as its rank sees it: it waits, gives up, or hears what is wrong."""

from __future__ import annotations

import json

import pytest
from waiting import until

from fd_large.engine import evaluation
from fd_large.engine.evaluation import Interrupted
from fd_large.errors import DataError
from fd_large.tasks.detection.scores import scoring_process
from fd_large.tasks.detection.scores.score_shards import NOTE
from fd_large.tasks.detection.scores.scoring_process import ScoringProcess


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a program in place of the one that scores."""

    def start(program):
        monkeypatch.setattr(scoring_process, "PROGRAM", ("-c", program))
        return ScoringProcess(tmp_path, "truth.json", images={7: "7.png"}, max_pixels=9)

    return start


def test_ranks_show_that_they_live_while_it_works_and_may_leave(start, monkeypatch):
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_CALLS", 0.01)
    calls = []

    def leave():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted

    scoring = start("import time; time.sleep(1000)")
    assert not scoring.done
    with pytest.raises(Interrupted):
        scoring.wait(leave)
    scoring.give_up()
    until(lambda: scoring.done, 60, "the process that was given up ends")


def test_what_is_asked_and_answered(start, tmp_path):
    scoring = start(f"import sys; open({str(tmp_path / 'asked')!r}, 'w').write(sys.stdin.read())")
    with pytest.raises(DataError, match="got '' "):
        scoring.wait(lambda: None)
    asked = json.loads((tmp_path / "asked").read_text())
    del asked["parent"]
    assert asked == {
        "folder": str(tmp_path),
        "annotations": "truth.json",
        "images": {"7": "7.png"},
        "max_pixels": 9,
        "only": [],
    }


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os; os.kill(os.getpid(), 9)", "got exit code -9"),
        (
            "import sys; print('a line of a library', flush=True)\n"
            """open(int(sys.argv[-1]), 'w').write('{"error": "a mask that cannot be read"}')""",
            "a mask that cannot be read",
        ),
    ],
)
def test_what_is_wrong_is_told_on_all_ranks(start, program, told, tmp_path):
    (tmp_path / NOTE).touch()
    with pytest.raises(DataError, match=told) as caught:
        start(program).wait(lambda: None)
    assert caught.value.agreed
    assert (tmp_path / NOTE).exists(), "a later start tries again"
