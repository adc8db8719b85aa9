"""What a run's folder records of the user's own code."""

from __future__ import annotations

import json
import logging

import pytest

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.runtime.run_folder import record_code, recorded_code


def test_code_is_recorded_with_the_step_from_which_it_is_used(tmp_path, caplog):
    assert recorded_code(tmp_path) == {}
    record_code(tmp_path, {}, 0)
    assert not (tmp_path / "code.json").exists(), "a run without such code has no such file"
    record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "2"}, 0)
    record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "2"}, 5)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "3"}, 7)
    assert ["b.py" in record.getMessage() for record in caplog.records] == [True]
    starts = json.loads((tmp_path / "code.json").read_text())
    assert [start["update"] for start in starts] == [0, 7]
    assert recorded_code(tmp_path) == {"module:a.py:x": "1", "module:b.py:y": "3"}


def test_a_file_that_is_as_it_was_recorded_may_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(doors, "_allowed", set())
    monkeypatch.setattr(doors, "_modules", {})
    names = {}
    for name in ("same", "edited", "gone"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
        names[name] = f"module:{tmp_path}/{name}.py:value"
    recorded = doors.hashes(list(names.values()))
    (tmp_path / "edited.py").write_text("value = 2\n")
    (tmp_path / "gone.py").unlink()
    doors.allow_unchanged(recorded)
    assert doors.load(names["same"], kind="losses", where="") == 1
    for name in ("edited", "gone"):
        with pytest.raises(ConfigError, match=f"{name}.py"):
            doors.load(names[name], kind="losses", where="")
