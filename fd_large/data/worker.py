"""Prepares loading processes to ignore signals to their process group.

A loading process (worker) ends when the training process ends.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POLL_SECONDS = 1.0
_IGNORED = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
# Bytes of a socket's name on Linux, without the zero at its end.
LONGEST_SOCKET_NAME = 107
_NAME_IN_FOLDER = "/pymp-12345678/listener-12345678"
# Folders for the socket if the folder for temporary files has too long a path.
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGTERM, SIGINT, SIGHUP and SIGUSR1 in this thread while the block runs.

    Processes that are started in the block inherit the blocked signals, in all of their threads.
    torch makes threads in a worker before it calls `start_worker` (if this process has several
    threads), and the system may deliver a signal to any thread that does not block it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *_IGNORED})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_number: int) -> None:
    """Prepares a worker that was started under `signals_blocked`; torch calls it in each worker.

    A signal to a whole process group (Ctrl-C, a closed terminal, the end of a Slurm job) would
    otherwise kill the workers before the training process has saved a checkpoint. So SIGINT, SIGHUP
    and SIGUSR1 are ignored, and SIGTERM ends the worker only if the training process sent it. A
    thread waits for this SIGTERM and for the end of the training process. torch's own check for a
    dead parent is not reached while a worker waits on a full pipe.
    """
    # The worker must not remove the parent's folder of sockets.
    _settings().pop("tempdir", None)
    _shorten_socket_name()
    # Through the inherited descriptor the training process would take the worker's signals for its
    # own.
    signal.set_wakeup_fd(-1)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Blocked once more, since Python unblocks it in workers that it starts by spawning.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_watch, args=(os.getppid(),), name="watch parent", daemon=True).start()


def _shorten_socket_name() -> None:
    """Moves this worker's temporary folder to a short path if socket names would be too long.

    A worker sends tensors through a socket, which Python (before 3.14) places below TMPDIR. With a
    TMPDIR longer than 75 bytes, as on batch systems, the worker would fail, and the training
    process would wait forever for a batch.
    """
    name = os.fsencode(tempfile.gettempdir() + _NAME_IN_FOLDER)
    short = [folder for folder in _SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if len(name) > LONGEST_SOCKET_NAME and short:
        tempfile.tempdir = short[0]


def _settings() -> dict[str, Any]:
    """Returns the settings that Python's multiprocessing keeps for this process; {} if none."""
    return vars(multiprocessing.current_process()).get("_config", {})


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        if hasattr(signal, "sigtimedwait"):
            sent = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
            if sent is not None and sent.si_pid == parent:
                break
        else:
            time.sleep(POLL_SECONDS)
    # Otherwise the folder of the worker's socket would stay behind.
    if folder := _settings().get("tempdir"):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
