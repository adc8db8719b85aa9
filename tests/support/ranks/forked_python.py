"""Stands for `python fd_large/train.py ...` where Slurm starts it: a server forks the rank.

That saves the imports. This process hands signals on, and ends as the rank does. The rank itself is
outside the tree of processes that Slurm knows, so that one job of the tests starts plain ones.
Whatever else the scripts ask of Python, Python does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from launch import RUN, rank_server

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
RUN_OF_TESTS = "FD_TEST_RUN"


def environment(folder: Path) -> dict[str, str]:
    """Returns the variables by which the batch scripts start it; writes a command into a folder.

    The servers run from here on until the caller ends.
    """
    for rank in range(2):
        rank_server(rank)
    command = folder / "forked_python"
    command.write_text(f'#!/bin/bash\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    command.chmod(0o755)
    return {"PYTHON": str(command), RUN_OF_TESTS: RUN}


def main(words: list[str]) -> None:
    """Runs the words that follow `python`; never returns."""
    if Path(words[0]).name != "train.py" or "--check" in words:
        os.execv(sys.executable, [sys.executable, *words])
    server = rank_server(int(os.environ["SLURM_PROCID"]), os.environ[RUN_OF_TESTS])
    # One that comes before the rank is there waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    rank = server.start(words, environ=dict(os.environ), cwd=Path.cwd(), log=sys.stdout.buffer)

    def hand_on(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # It has ended just now.
            os.kill(rank.pid, number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    code = rank.wait(timeout=float("inf"))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
