"""A trace of the steps that were asked for, and of no others."""

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from fd_large.runtime.hooks import Hook
from fd_large.runtime.profiler import Profiler, communication_shares


class Marks(Hook):
    """Computes under a name that the trace must show: of the next step."""

    def on_start(self, setting):
        self.mark(setting.first_update)

    def after_update(self, update):
        self.mark(update.index + 1)
        return super().after_update(update)

    def mark(self, index):
        with record_function(f"update {index}"):
            torch.ones(3).sum()


def event(name, begin, end, device=DeviceType.CPU, thread=1):
    times = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=times, device_type=device, thread=thread)


def test_the_share_of_communication():
    # On a GPU only kernels count, whoever started them; two streams overlap.
    gpu = DeviceType.CUDA
    trace = [
        event("aten::mm", 0, 900),
        event("gemm", 100, 300, gpu),
        event("ncclDevKernel_AllGather", 250, 400, gpu),
        event("ncclDevKernel_ReduceScatter", 390, 500, gpu),
        event("elementwise", 450, 1100, gpu),
    ]
    shares = communication_shares(trace)
    assert shares["seconds"] == pytest.approx(1000e-6)
    assert shares["communication"] == pytest.approx(250 / 1000)
    assert shares["communication_alone"] == pytest.approx(150 / 1000)
    # On a CPU gloo's thread copies for the collective; the main thread computes beside it or waits.
    trace = [
        event("aten::mm", 0, 400),
        event("c10d::allreduce_", 400, 450),
        event("gloo:all_reduce", 300, 600, thread=7),
        event("aten::copy_", 500, 600, thread=7),
        event("aten::add", 700, 1000),
    ]
    shares = communication_shares(trace)
    assert shares["communication"] == pytest.approx(0.3)
    assert shares["communication_alone"] == pytest.approx(0.2)
    assert communication_shares([])["communication"] == 0.0


def traced(folder):
    shares = json.loads((folder / "profile" / "communication.json").read_text())
    assert shares["communication"] == 0.0, "one rank"
    assert shares["seconds"] > 0
    (path,) = (folder / "profile").glob("*.gz")
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
    # What follows the last step's end is computed under the next one's mark.
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


def test_a_start_that_has_lost_the_folder_writes_no_trace(make_setting, run_updates, tmp_path):
    run_updates([Profiler(2)], make_setting(owned=lambda: False), 8)
    assert not (tmp_path / "profile").exists()
