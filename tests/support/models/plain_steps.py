"""Steps of plain torch on one process, to which an engine's steps are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.engine.schedule import CosineSchedule
from fd_large.recipes.sections import Optim


def plain_adamw(groups: Iterable[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """Returns torch's AdamW, one tensor after another; each step sets its learning rates."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=optim.betas, eps=optim.eps, foreach=False)


def plain_step(
    loss: Tensor,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: CosineSchedule,
    number: int,
    *,
    clip_norm: float,
) -> float:
    """Takes a step, and returns the norm of all gradients before they were clipped.

    Args:
        loss: The loss of the whole batch.
        task: What is trained.
        optimizer: Its optimiser; a group with a "scale" has its learning rate scaled by that.
        schedule: The learning rates.
        number: Number of the step.
        clip_norm: The largest norm of all gradients together.
    """
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(task.parameters(), clip_norm)
    for group in optimizer.param_groups:
        scaled = "scale" in group
        rate = schedule.scaled_at(number, group["scale"]) if scaled else schedule.at_step(number)
        group["lr"] = rate
    optimizer.step()
    return norm.item()
