"""Lets a run use a process that already does other work: a notebook, a script, a server.

`guest()` lets a block use the process as the single rank of a run. After the block it restores what
a run changes: process group, signal handlers, loggers, environment, limits, settings of torch.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fd_large.errors import LaunchError
from fd_large.ranks.launch import find_launch
from fd_large.ranks.processes import SIGNALS
from fd_large.runtime import terminal


def cuda_devices() -> list[int]:
    """Returns [index of the current GPU], whose random state a run may change; [] without CUDA.

    CUDA counts only if this process has initialised it.
    """
    import torch

    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


@contextmanager
def guest() -> Iterator[None]:
    """Lets the block use this process as the single rank of a run; then undoes the run's changes.

    Raises: LaunchError: if the process is one of several ranks or already has a process group.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise LaunchError(
            "fd_large: only a single process can use it; got WORLD_SIZE "
            f"{os.environ['WORLD_SIZE']}, expected 1. Start several ranks by the command line: "
            "deepspeed --module fd_large.train ..."
        )
    environment, limits = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)
    logging_as_it_was, handlers = _logging(), _signal_handlers()
    excepthook, captures = sys.excepthook, warnings.showwarning
    # Importing torch takes seconds.
    import torch

    from fd_large.ranks import distributed

    if torch.distributed.is_initialized():
        raise LaunchError(
            "fd_large: the process already has a process group of torch.distributed; got a group, "
            "expected none. Destroy this group first, or start another process."
        )
    threads = torch.get_num_threads()
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    tf32 = [flag.allow_tf32 for flag in flags]
    try:
        with torch.random.fork_rng(devices=cuda_devices()):
            distributed.start(find_launch({}), is_guest=True)
            yield
    finally:
        if "fd_large.engine.zero.start" in sys.modules:
            from fd_large.engine.zero import start

            start.stop()
        distributed.stop()
        terminal.give_back()
        for restore in (*logging_as_it_was, *handlers):
            restore()
        logging.captureWarnings(False)
        warnings.showwarning, sys.excepthook = captures, excepthook
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        torch.set_num_threads(threads)
        for flag, value in zip(flags, tf32, strict=True):
            flag.allow_tf32 = value
        # `fd_large.imports` froze the caller's objects too: the collector is to see them again.
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _logging() -> list[Any]:
    """Returns functions that restore handlers, level and propagation of a logger each.

    The loggers are the root logger and DeepSpeed's.
    """

    def restoring(logger: logging.Logger) -> Any:
        handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate

        def restore() -> None:
            for handler in list(logger.handlers):
                if handler not in handlers:
                    logger.removeHandler(handler)
                    handler.close()
            for handler in handlers:
                if handler not in logger.handlers:
                    logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

        return restore

    return [restoring(logging.getLogger(name)) for name in ("", "DeepSpeed", "deepspeed")]


def _signal_handlers() -> list[Any]:
    """Returns functions that restore the present signal handlers; [] outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in handlers.items():
            if handler is not None:  # None stands for a handler that is not Python's.
                signal.signal(number, handler)

    return [restore]
