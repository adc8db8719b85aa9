"""How a loading process behaves: signals are the training process's affair, and it dies with it."""

from __future__ import annotations

import os
import signal
import threading
import time

POLL_SECONDS = 1.0


def start_worker(_number: int) -> None:
    """Prepares a loading process; the torch DataLoader calls this in each.

    A signal that reaches a whole process group (Ctrl-C, a closed terminal, the end of a Slurm job)
    would otherwise kill the workers under a training process that means to save first. So SIGINT,
    SIGHUP and SIGUSR1 are ignored, and SIGTERM is obeyed only when the training process itself
    sends it. A thread waits for that, and for the training process's end: torch's own watch misses
    it while a worker is held up on a full pipe.
    """
    # Inherited: the training process would take the worker's signals for its own.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_watch, args=(os.getppid(),), name="watch parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        if hasattr(signal, "sigtimedwait"):
            sent = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
            if sent is not None and sent.si_pid == parent:
                break
        else:
            time.sleep(POLL_SECONDS)
    os._exit(0)
