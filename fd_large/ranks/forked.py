"""Forks the ranks of this machine from one process: `python -m fd_large --ranks 2 train ...`.

Imports take most of the time before a rank's first step. Ranks that are forked from a process share
the modules that the process has imported, and no launcher imports these modules as well. The
process passes signals on to its ranks and waits until all ranks have ended. This file does not
import torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from fd_large.errors import Exit, LaunchError
from fd_large.ranks.launch import LOOPBACK, find_launch, free_port
from fd_large.ranks.processes import handlers_to_replace

SECONDS_AFTER_A_FAILURE = 30.0
"""Seconds from a rank's failure until the others are killed; ranks that have met end earlier."""


def check_alone() -> None:
    """Checks that this process may start ranks, because it is not a rank itself.

    Raises: LaunchError: if this process is a rank of another launcher, which the message names.
    """
    launch = find_launch()
    if launch.launcher != "python" or launch.world_size > 1:
        raise LaunchError(
            f"--ranks: another launcher has already started ranks; got {launch.world_size} by "
            f"{launch.launcher}, expected a single process. Leave out --ranks, or the other "
            "launcher."
        )


def run_ranks(
    number: int, work: Callable[[], int], *, prepare: Callable[[], None] = lambda: None
) -> int:
    """Forks ranks on this machine, runs a function on each, and waits until all ranks have ended.

    After a rank's failure, ranks that are left are killed after SECONDS_AFTER_A_FAILURE.

    Args:
        number: The number of ranks.
        work: Function that a rank runs; returns the exit code of the rank.
        prepare: Called in each rank while signals are still blocked, so that it can install
            handlers.

    Returns: 0 if all ranks ended with 0, else the first other exit code, which is 128 + the signal
        for a rank that a signal ended.
    """
    everywhere = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
    }
    ranks: set[int] = set()
    handled = handlers_to_replace()

    def pass_on(number: int, _: FrameType | None = None) -> None:
        for pid in list(ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def start() -> int:
        prepare()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        return work()

    # Every rank would print what is still in the buffer.
    sys.stdout.flush()
    # A signal that comes meanwhile waits until all ranks are there to get it.
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        for rank in range(number):
            pid = os.fork()
            if pid == 0:
                os.environ |= everywhere | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                end_with(start)
            ranks.add(pid)
    except OSError:  # The user may have no more processes.
        pass_on(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        raise
    for each in handled:
        signal.signal(each, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)

    impatient: threading.Timer | None = None
    failed = 0
    while ranks:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        is_rank = ended.si_pid in ranks
        # Before the process is reaped, after which the system may reuse its id.
        ranks.discard(ended.si_pid)
        os.waitpid(ended.si_pid, 0)
        if not is_rank:  # As process 1 of a container, this one adopts orphans of its ranks.
            continue
        code = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)
        # Ranks that have saved wait for each other, however long that takes.
        if code not in (0, Exit.AGAIN) and impatient is None:
            impatient = threading.Timer(SECONDS_AFTER_A_FAILURE, pass_on, (signal.SIGKILL,))
            impatient.daemon = True
            impatient.start()
        failed = failed or code
    if impatient is not None:
        impatient.cancel()
    return failed


def end_with(work: Callable[[], int]) -> NoReturn:
    """Runs a function, and ends this process at once with the exit code that the function returns.

    If the function raises SystemExit, the exit code is that of SystemExit; after a Ctrl-C it is
    INTERRUPTED, and after any other error 1. The interpreter's shutdown is left out: DeepSpeed's
    threads now and then abort an interpreter that shuts down, and a rank whose peers are gone may
    wait during the shutdown for the kernel of a collective.
    """
    code = 1
    try:
        code = work()
    except KeyboardInterrupt:  # A Ctrl-C comes twice: from the terminal and from `pass_on`.
        code = Exit.INTERRUPTED
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        else:
            code = leaving.code or 0
    except BaseException as error:
        # This hook writes to terminal and log: runtime/terminal.py.
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with suppress(OSError):  # Nobody may read them any more.
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
