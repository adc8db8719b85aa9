"""Ends a rank at a signal that reaches it while it imports, before training catches signals.

A scheduler's signal would kill the rank with the signal's own code (138, 143), and no message would
say why. No step has run yet, so the rank leaves with the exit code for a run that was saved and can
be started again. This file does not import torch.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from fd_large.errors import Exit

CAUGHT = (signal.SIGTERM, signal.SIGUSR1)
"""The signals of schedulers. Ctrl-C and a closed terminal end a start as they end any program."""


def leave_at_signals() -> None:
    """Makes SIGTERM and SIGUSR1 end this process with exit code 75.

    The effect on a signal lasts until another handler for the signal is set. A signal that is
    ignored, as under nohup, or that already has a handler, is left alone.
    """
    # A handler is not called while the main thread is in a library, such as one that meets the
    # other ranks; a thread that reads this pipe goes on.
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reads,), name="start", daemon=True).start()
    for number in CAUGHT:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, await_the_end)


def leave_no_more() -> None:
    """Undoes `leave_at_signals`: restores default actions, for training that catches no signals."""
    for number in CAUGHT:
        if signal.getsignal(number) is await_the_end:
            signal.signal(number, signal.SIG_DFL)


def await_the_end(number: int, frame: FrameType | None) -> None:
    """Signal handler that waits until the thread of `leave_at_signals` ends the process.

    Args:
        number: Number of the signal; not used.
        frame: The interrupted frame; not used.
    """
    threading.Event().wait()


def _listen(pipe: int) -> None:
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if signal.getsignal(number) is await_the_end:
                name = signal.Signals(number).name
                words = f"{name} before training began: the same command starts again\n"
                os.write(2, words.encode())
                os._exit(Exit.AGAIN)
