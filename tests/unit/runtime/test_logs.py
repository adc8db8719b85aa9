"""Where records go: the terminal, this rank's file, or both."""

from __future__ import annotations

import logging
import os
import pty
import sys
from functools import cache

import pytest

from fd_large.ranks import distributed
from fd_large.runtime import logs, terminal


@pytest.fixture(autouse=True)
def restored():
    """Logging as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_0_speaks_and_every_file_keeps_all(rank, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    logs.start(rank)
    ours, theirs = logging.getLogger("fd_large.x"), logging.getLogger("library")
    ours.info("before the folder is known")
    logs.set_up(tmp_path)
    ours.info("one of ours")
    ours.info("not for the terminal", extra=logs.FILE_ONLY)
    ours.debug("a detail")
    theirs.debug("not at all")
    theirs.warning("one of theirs")
    theirs.error("an error of theirs")
    logging.getLogger("DeepSpeed").info("of DeepSpeed")
    shown = capsys.readouterr().out
    kept = (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()
    everywhere = {"an error of theirs"}
    ours_alone = {"before the folder is known", "one of ours"}
    in_files = {"not for the terminal", "a detail", "one of theirs", "of DeepSpeed"}
    for text in everywhere | ours_alone | in_files:
        assert kept.count(text) == 1, text
        assert (text in shown) == (text in everywhere | (ours_alone if rank == 0 else set())), text
    assert "not at all" not in kept
    assert ("rank 3: " in shown) == (rank == 3)
    order = [kept.index(text) for text in ("before the folder", "one of ours", "an error")]
    assert order == sorted(order)


def test_records_do_not_command_the_terminal(capsys):
    logs.start(0)
    logging.getLogger("fd_large.x").warning("%s", "a\x1b]0;title\x07\x1b[31mred\x9b1m\nb\tc")
    shown = capsys.readouterr().out
    assert "a?]0;title??[31mred?1m\nb" in shown


@pytest.mark.parametrize(("extra", "breaks"), [(None, True), (logs.WHOLE_LINES, False)])
def test_a_command_is_not_broken_on_a_terminal(extra, breaks, monkeypatch):
    ours, theirs = pty.openpty()
    words = "word " * 40
    # The console remembers COLUMNS as it was when it was made.
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(terminal, "console", cache(terminal.console.__wrapped__))
    with os.fdopen(theirs, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        logs.start(0)
        logging.getLogger("fd_large.x").info("%s", words, extra=extra)
        out.flush()
        shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert shown.rstrip().count("\n") == (2 if breaks else 0)


def test_no_record_and_no_traceback_has_a_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    logs.start(0)
    ours = logging.getLogger("fd_large.x")
    ours.warning("early %s", "https://u:PW@h/x?SIG")
    logs.set_up(tmp_path)
    try:
        raise OSError("url: /x?a=SIG of https://u:PW@h")
    except OSError:
        ours.exception("it failed")
        logging.getLogger("aiohttp").warning("%r", {"url": "https://u:PW@h/x?SIG"})
    shown = capsys.readouterr()
    (path,) = tmp_path.glob("logs/*")
    for text in (shown.out + shown.err, path.read_text()):
        assert "https://***@h" in text
        assert "PW" not in text
        assert "SIG" not in text
