"""A trace of the updates that were asked for, and of no others."""

import gzip
import json
import logging

import pytest
import torch
from torch.profiler import record_function

from fd_large.runtime.hooks import Hook
from fd_large.runtime.profiler import Profiler


class Marks(Hook):
    """Computes under a name that the trace must show: of the next update."""

    def on_start(self, setting):
        self.mark(setting.first_update)

    def after_update(self, update):
        self.mark(update.index + 1)
        return super().after_update(update)

    def mark(self, index):
        with record_function(f"update {index}"):
            torch.ones(3).sum()


def traced(folder):
    (path,) = (folder / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    return path.name, sorted(name for name in names if name.startswith("update "))


@pytest.mark.parametrize(
    ("first", "last", "name", "updates"),
    [
        (0, 8, "updates_3_to_4", ["update 3", "update 4"]),
        (5, 10, "updates_8_to_9", ["update 8", "update 9"]),
        (0, 4, "updates_3_to_3", ["update 3"]),
    ],
)
def test_the_updates_after_the_third(
    first, last, name, updates, make_setting, run_updates, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    run_updates([Profiler(2), Marks()], make_setting(first=first), last)
    file, seen = traced(tmp_path)
    assert file == f"{name}.pt.trace.json.gz"
    # What follows the last update's end is computed under the next one's mark.
    assert [mark for mark in seen if mark in updates] == updates
    assert len(seen) <= len(updates) + 1
    assert file in caplog.text


def test_a_run_that_ends_before_says_so(make_setting, run_updates, tmp_path, caplog):
    run_updates([Profiler(2)], make_setting(total=2), 2)
    assert not (tmp_path / "profile").exists()
    assert "nothing was traced" in caplog.text


def test_a_trace_that_cannot_be_written_ends_no_run(make_setting, run_updates, tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    run_updates([Profiler(2)], make_setting(), 8)
    assert "was not written" in caplog.text
