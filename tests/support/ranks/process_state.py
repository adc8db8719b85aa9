"""What a run could leave behind in the process that it ran in."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import warnings
from typing import Any

import torch
from torch import distributed as dist


def state() -> dict[str, Any]:
    """The process as it is now."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    root = logging.getLogger()
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in numbers],
        "handlers": list(root.handlers),
        "level": root.level,
        "excepthook": sys.excepthook,
        "warnings": warnings.showwarning,
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "torch's threads": torch.get_num_threads(),
        "torch's random state": torch.random.get_rng_state().tolist(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "linear": torch.nn.functional.linear,
        "group": dist.is_initialized(),
    }
