"""Steps of plain torch on one process, to which an engine's steps are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.recipes.sections import Optim


def plain_adamw(groups: Iterable[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """Returns torch's AdamW, one tensor after another; each step sets its learning rates."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=optim.betas, eps=optim.eps, foreach=False)


def plain_step(
    loss: Tensor,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float,
    rate_of: Callable[[dict[str, Any]], float],
) -> float:
    """Takes a step, and returns the norm of all gradients before they were clipped.

    Args:
        loss: The loss of the whole batch.
        task: What is trained.
        optimizer: Its optimiser.
        clip_norm: The largest norm of all gradients together.
        rate_of: Returns the learning rate of a group of the optimiser.
    """
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(task.parameters(), clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group)
    optimizer.step()
    return norm.item()
