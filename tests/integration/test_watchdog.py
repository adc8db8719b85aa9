"""A rank is stopped dead: the others leave their stacks and exit with 75, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import twin
from kills import wait_for_steps
from pictures import write_pictures

WORDS = "--batch.global_batch_size 6 --optim.max_steps 12 --runtime.save_every 4 \
    --batch.micro_batch_size 1 --data.workers 0 --student.architecture.depths 1 1"


def test_a_rank_that_hangs_ends_the_others_and_the_same_command_goes_on(tmp_path: Path) -> None:
    pictures, run_dir = write_pictures(tmp_path / "pictures", 26), tmp_path / "run"
    words = WORDS.split()
    started = twin.start(pictures, run_dir, *words, "--runtime.watchdog_seconds", "8", ranks=3)
    try:
        wait_for_steps(started, 6)
        stopped = started.processes[2]
        os.kill(stopped.pid, signal.SIGSTOP)
        assert [process.wait(timeout=60) for process in started.processes[:2]] == [75, 75]
        assert stopped.poll() is None
    finally:
        outputs = started.kill()
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "hung"
    for rank in (0, 1):
        log = (run_dir / f"logs/rank_{rank:05d}.log").read_text()
        for told in (log, outputs[rank]):
            assert f"watchdog: rank {rank} (" in told
            assert "has not moved for " in told
            assert "fd_large/engine/loop.py" in told
        assert "thread MainThread" in log
        assert "Thread 0x" in outputs[rank]
    assert "watchdog" not in (run_dir / "logs/rank_00002.log").read_text()

    resumed = twin.train(pictures, run_dir, *words, ranks=3)
    assert "resumed after step 4" in resumed.outputs[0]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
    assert len(twin.losses(run_dir)) == 12
