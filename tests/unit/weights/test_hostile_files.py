"""Whatever is changed in a file, it is read, or refused in one sentence."""

from __future__ import annotations

import logging
import os

import hostile
import pytest
from hostile import run


def test_changed_files_are_read_or_refused(tmp_path):
    pytest.importorskip("transformers")
    outcome = run(100, tmp_path)
    # That sound ones are read is held before; which of the changed ones are depends on the draws.
    assert outcome.ends.keys() <= {"read", "refused"}
    assert outcome.ends.total() == 100


def test_files_behind_a_dead_child_are_read_by_another(tmp_path, monkeypatch):
    def read_all(folder):
        if folder.name in ("1", "2"):
            os._exit(7)
        return "refused"

    monkeypatch.setattr(hostile, "read_all", read_all)
    died = "ended by code 7 of the process"
    ends = hostile.in_children([tmp_path / str(n) for n in range(4)])
    assert ends == ["refused", died, died, "refused"]


def test_logging_goes_on_after_sound_files_were_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "write_sound", lambda folder: (folder / "own").mkdir())
    monkeypatch.setattr(hostile, "read_all", lambda folder: "refused")
    with pytest.raises(AssertionError, match="refused"):
        run(10, tmp_path)
    assert logging.root.manager.disable == logging.NOTSET
