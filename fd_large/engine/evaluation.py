"""What every evaluation needs: evaluation mode, and a way to leave in the middle."""

from __future__ import annotations

import torch

from fd_large.engine.zero.engine import Engine


class Interrupted(Exception):
    """The ranks have agreed to leave an evaluation."""


class evaluating:
    """Evaluation mode without gradients, and training mode again."""

    def __init__(self, engine: Engine) -> None:
        self._task, self._no_grad = engine.task, torch.no_grad()

    def __enter__(self) -> None:
        self._task.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        self._task.train()
