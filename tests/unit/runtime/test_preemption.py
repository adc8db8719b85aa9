"""Reasons to stop, as one rank notices them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest
from faults import watching

from fd_large.ranks import distributed, processes
from fd_large.ranks.processes import SIGNALS
from fd_large.runtime import preemption
from fd_large.runtime.hooks import Wish
from fd_large.runtime.preemption import Preemption

STOP = Wish(stop=True)


@pytest.fixture(autouse=True)
def handlers():
    """The test process gets its own back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    processes._holds.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def started(make_setting):
    def start(checkpoint_bytes=1000, notice_seconds=120.0, **more):
        hook = Preemption(notice_seconds, **more)
        hook.on_start(make_setting(checkpoint_bytes=checkpoint_bytes))
        return hook

    return start


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_kept_until_it_is_asked_for_also_one_before_the_start(number, make_setting):
    hook = Preemption(120.0)
    os.kill(os.getpid(), number)
    hook.on_start(make_setting())
    assert hook.wish() == STOP
    assert hook.wish() == STOP


def test_the_end_of_a_process_waits_for_no_signal(started):
    started()
    listeners = [thread for thread in threading.enumerate() if thread.name == "signals"]
    assert [thread.daemon for thread in listeners] == [True] * len(listeners) != []


def test_the_file_is_found_obeyed_and_removed(started, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "SECONDS_BETWEEN_LOOKS", 0.0)
    hook = started()
    assert hook.wish() == Wish()
    (tmp_path / preemption.STOP_FILE).touch()
    assert hook.wish() == STOP
    hook.on_end("preempted")
    assert not (tmp_path / preemption.STOP_FILE).exists()
    assert not list(tmp_path.glob(".write_probe*"))


@pytest.mark.parametrize(("local_rank", "written"), [(0, True), (3, False)])
def test_one_rank_of_a_node_measures_for_all_of_them(
    local_rank, written, started, tmp_path, monkeypatch
):
    monkeypatch.setattr(distributed, "local_rank", lambda: local_rank)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 8)
    with watching(tmp_path) as watched:
        started()
    probes = [each.name for each in watched.operations if ".write_probe" in each.path.name]
    assert ("open" in probes) == bool(probes) == written


def test_it_leaves_room_for_the_slowest_save_before_the_job_ends(started, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(preemption.time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 100))
    hook = started()
    assert hook.wish() == Wish()
    now += 60
    hook.on_saved(10.0)
    assert hook.wish() == Wish(), "40 s are left, 25 are needed"
    hook.on_saved(30.0)
    assert hook.wish() == STOP, "40 s are left, 45 are needed"


def test_it_says_at_the_start_whether_a_save_fits(started, caplog):
    caplog.set_level(logging.DEBUG)
    started(notice_seconds=60.0)
    assert "the notice is 60 s" in caplog.text
    assert "DOES NOT FIT" not in caplog.text
    # 10^15 bytes take more than a minute on any disk.
    started(checkpoint_bytes=10**15, notice_seconds=60.0)
    assert "A SAVE DOES NOT FIT" in caplog.text
    assert "--signal=B:USR1@" in caplog.text
    # A launcher that kills its ranks soon after a Ctrl-C.
    caplog.clear()
    started(checkpoint_bytes=10**15, launcher="torchrun")
    assert "torchrun kills its ranks after 30 s" in caplog.text


@pytest.mark.parametrize("number", SIGNALS)
def test_a_next_start_and_the_watch_over_the_launcher_know_at_once(number, started):
    left = []
    hook = started(leaving=lambda: left.append(number))
    assert (left, processes._holds) == ([], [])
    for _ in range(2):
        os.kill(os.getpid(), number)
    assert (left, len(processes._holds)) == ([number], 1)
    hook.on_end("preempted")
    assert processes._holds == []


def test_a_next_start_knows_of_a_reason_that_another_rank_has(started):
    left = []
    hook = started(leaving=lambda: left.append("leaving"))
    hook.on_stop()
    assert (left, len(processes._holds)) == (["leaving"], 1)
    hook.on_end("preempted")


def test_nohup_is_obeyed_and_ctrl_c_given_back(started):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    hook = started()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) != before
    hook.on_failure("failed", "an error")
    assert signal.getsignal(signal.SIGINT) == before


def test_what_is_given_back_twice_closes_no_file_of_another(started):
    hook = started()
    hook.on_end("done")
    another = os.pipe()
    hook.on_failure("failed", "the end of a later hook")
    for end in another:
        os.close(end)


# The main thread waits in a call that no signal ends, as in a collective without its peers.
STUCK = """
import ctypes, sys
from pathlib import Path
from fd_large.runtime import preemption
from fd_large.runtime.hooks import Setting
from fd_large.runtime.run_folder import write_status

preemption.SAME_PRESS_SECONDS = 0.3
hook = preemption.Preemption(
    120.0, write_status=lambda status: write_status(Path(sys.argv[1]), status)
)
hook.on_start(Setting(
    folder=Path(sys.argv[1]), facts={}, first_update=0, total_updates=1, global_batch_size=1,
    micro_batch_size=1, accumulation=1, world_size=1, log_every=1, start="this",
))
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("stuck", flush=True)
lock(mutex)
"""


def test_a_second_ctrl_c_ends_a_rank_that_is_stuck(tmp_path):
    rank = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout.readline() == "stuck\n"
        # As a terminal and then a launcher send it: one Ctrl-C.
        rank.send_signal(signal.SIGINT)
        rank.send_signal(signal.SIGINT)
        time.sleep(0.6)
        assert rank.poll() is None
        rank.send_signal(signal.SIGINT)
        said = rank.communicate(timeout=60)[1]
    finally:
        rank.kill()
    assert rank.returncode == 130
    assert "the run saves after this step" in said
    assert "ended at once" in said
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"


def test_the_end_of_the_job_is_asked_for_again_when_it_is_near(started, tmp_path, monkeypatch):
    now = 1_000_000.0
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    moved = datetime.fromtimestamp(now + 5000).isoformat()
    squeue.write_text(f"#!/bin/sh\n[ $3 = 7 ] && echo {moved}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 10))
    monkeypatch.setattr(preemption.time, "time", lambda: now)
    hook = started()
    assert hook.wish() == Wish(), "the time limit was raised"
    now += 4990
    assert hook.wish() == STOP
    # Slurm does not answer: what it said at the start holds.
    squeue.write_text("#!/bin/sh\nexit 1\n")
    now = 1_000_000.0
    assert started().wish() == STOP
