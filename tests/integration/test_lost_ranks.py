"""One rank is lost while its peers wait in a collective that never returns: all ranks end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launch import start_ranks

PROGRAM = Path(__file__).parent / "programs" / "lost_ranks.py"


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("mistake", 2, "rank 2 has failed (exit code 2): data.root: one image is damaged;"),
        (
            "killed",
            -signal.SIGKILL,
            "rank 2 has failed (exit code 1): its process was killed, or ended ",
        ),
    ],
)
def test_peers_in_a_collective_that_never_returns_end(
    how: str, code: int, told: str, tmp_path: Path
) -> None:
    started = start_ranks(PROGRAM, how, ranks=3, env={"FD_LARGE_EXITS": str(tmp_path)})
    waiting, stopped, lost = started.processes
    try:
        assert lost.wait(60) == code
        # The collective itself would wait for half an hour.
        assert waiting.wait(60) == 1
        assert stopped.poll() is None
    finally:
        outputs = started.kill()
    assert f"rank 0 ends because {told}" in outputs[0]
    codes = {path.name: json.loads(path.read_text())["code"] for path in tmp_path.iterdir()}
    assert codes == {"rank_0.json": 1} | ({"rank_2.json": 2} if code == 2 else {})


def test_one_rank_speaks_for_rank_0_that_was_killed() -> None:
    started = start_ranks(PROGRAM, "first", ranks=3)
    try:
        codes = [process.wait(60) for process in started.processes]
    finally:
        outputs = started.kill()
    assert codes == [-signal.SIGKILL, 1, 1]
    told = ["rank 0 has failed" in output for output in outputs]
    assert told == [False, True, False]
