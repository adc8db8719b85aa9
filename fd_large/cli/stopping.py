"""Ends commands other than training, after a signal, with one sentence and exit code 75."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fd_large.errors import Exit, FDError
from fd_large.ranks.processes import handlers_to_replace


class StoppedError(FDError):
    """The command was stopped by a signal, and the same command may be started again."""

    exit_code = Exit.AGAIN


@contextmanager
def ending_with(sentence: str) -> Iterator[None]:
    """Raises an error with exit code 75 if a signal stops the block.

    The first signal stops the block at any point. Further signals, which a launcher sends after a
    Ctrl-C, are ignored, so that they neither interrupt the clean-up nor change the exit code. The
    message is `sentence`, which states what is done and the remedy.

    Raises: StoppedError: after Ctrl-C, or a scheduler's signal before the end of a job.
    """
    before = handlers_to_replace()

    def stop(number: int, frame: FrameType | None) -> None:
        for signal_number in before:
            signal.signal(signal_number, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        raise StoppedError(sentence) from None
    finally:
        for number, handler in before.items():
            # After a signal the process ends, and further signals stay ignored.
            if handler is not None and signal.getsignal(number) == stop:
                signal.signal(number, handler)
