"""Makes the optimiser for two parameter groups: the fastest AdamW, LARS, or the user's own."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.engine.task import Task
from fd_large.engine.zero import compiled_ops
from fd_large.engine.zero.lars import Lars
from fd_large.engine.zero.own_optimizer import Kept, tried
from fd_large.engine.zero.start import deepspeed
from fd_large.errors import ConfigError
from fd_large.kernels.choose import has_nvidia_apex
from fd_large.ranks import distributed
from fd_large.recipes.sections import Optim

log = logging.getLogger(__name__)

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMISERS: dict[str, Any] = {"adamw": None, "lars": Lars}
"""The built-in optimisers, each a function of (groups, lr); None for AdamW, of which
`make_optimizer` chooses an implementation."""

# Numbers of the tensors that a fused optimiser steps on trial; kernels cut them at powers of two.
_TRIED = (1, 1000, 2**18 + 3)

_kept: WeakKeyDictionary[torch.optim.Optimizer, Kept] = WeakKeyDictionary()


def kept_by(optimizer: torch.optim.Optimizer) -> Kept:
    """Returns which state an optimiser of `make_optimizer` keeps for each tensor."""
    return _kept[optimizer]


def moments_of(optim: Optim, device: str = "cpu") -> tuple[str, ...]:
    """Returns the names of an optimiser's moments, each of which takes 4 bytes a parameter.

    An optimiser other than AdamW is tried on `device`.

    Raises: ConfigError: if the optimiser does not exist or fails its trial.
    """
    make = _maker_of(optim)
    return tuple(tried(make, optim, torch.device(device)).moments) if make else ADAMW_MOMENTS


def _maker_of(optim: Optim) -> Callable[..., torch.optim.Optimizer] | None:
    """Returns a function (groups, lr=...) that makes the optimiser `optim.name`; None for AdamW."""
    return doors.load(optim.name, kind="optimisers", where="optim.name", built_in=OPTIMISERS)


def decays(
    name: str, ndim: int, skip_names: frozenset[str], skip_keywords: tuple[str, ...]
) -> bool:
    """Returns whether weight decay applies to a parameter.

    It does not apply to one-dimensional parameters, to biases, to the names `skip_names`, and to
    names that contain any of `skip_keywords`.

    Source: official code, optimizer.py get_pretrain_param_groups.
    """
    if ndim == 1 or name.endswith(".bias") or name in skip_names:
        return False
    return not any(keyword in name for keyword in skip_keywords)


def parameter_groups(task: Task, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trained parameters of a task in torch's groups "decay" and "no_decay".

    The group "decay" has weight decay `weight_decay`, the other none. An empty group is left out.
    """
    skip_names, skip_keywords = task.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter's own shape is empty; the full one is beside it.
            ndim = len(getattr(parameter, "ds_shape", parameter.shape))
            groups[decays(name, ndim, skip_names, skip_keywords)].append(parameter)
    rows = [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]
    return [row for row in rows if row["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], optim: Optim, *, on_gpu: bool
) -> torch.optim.Optimizer:
    """Makes LARS, the user's optimiser, or AdamW by DeepSpeed's fused kernel, NVIDIA apex or torch.

    Args:
        groups: Groups from `parameter_groups`.
        optim: The recipe's section, with the implementation of AdamW in `fused`.
        on_gpu: Whether the masters are on a GPU, as fused CUDA kernels need.

    Raises:
        ConfigError: If the named implementation of AdamW does not work here, or the optimiser does
            not act element by element.
    """
    if make := _maker_of(optim):
        device = distributed.device() if on_gpu else torch.device("cpu")
        state_fields = tried(make, optim, device)
        optimizer = make(groups, lr=optim.base_lr)
        log.debug(
            "optimiser: %s, keeps %s", optim.name, ", ".join(state_fields.moments) or "nothing"
        )
    else:
        optimizer = _adamw(groups, optim, on_gpu=on_gpu)
        state_fields = Kept(
            dict.fromkeys(ADAMW_MOMENTS, 0.0),
            _on_device if isinstance(optimizer, torch.optim.AdamW) else _number,
        )
    _kept[optimizer] = state_fields
    return optimizer


def _adamw(groups: list[dict[str, Any]], optim: Optim, *, on_gpu: bool) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    passed_over = []
    for kind in (optim.fused,) if optim.fused != "auto" else ("deepspeed", "apex", "torch"):
        reason = "the masters are in host memory" if not on_gpu and kind != "torch" else None
        reason = reason or _why_not(kind, settings)
        if reason is None:
            log.debug("optimiser: AdamW of %s%s", kind, "".join(passed_over))
            return _made(kind, groups, settings)
        if optim.fused != "auto":
            raise ConfigError(
                f"optim.fused: {kind}'s AdamW does not work here; got {reason}, expected a "
                "working AdamW. Set --optim.fused auto."
            )
        if on_gpu and kind == "deepspeed":
            log.warning("optimiser: DeepSpeed's FusedAdam is not used on any rank: %s", reason)
        passed_over.append(f"; not {kind}'s: {reason}")
    raise AssertionError("torch's AdamW always works")


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Sets the learning rate of all groups of `optimizer`, which may be DeepSpeed's wrapper."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _made(
    kind: str, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    apex = kind == "apex"
    module = importlib.import_module("apex.optimizers") if apex else deepspeed.ops.adam
    return module.FusedAdam(groups, adam_w_mode=True, **settings)


def _why_not(kind: str, settings: dict[str, Any]) -> str | None:
    """Returns why an implementation of AdamW cannot be used, or None if it can be used.

    All ranks must call this function, and get the same result.

    Args:
        kind: "deepspeed", "apex" or "torch".
        settings: Keyword arguments of the constructor.
    """
    if kind == "torch":
        return None
    if kind == "deepspeed":
        reason = compiled_ops.load("FusedAdam")
    else:
        missing = None if has_nvidia_apex() else "NVIDIA apex is not installed"
        reason = compiled_ops.agreed(lambda: missing)
    return reason or compiled_ops.agreed(lambda: _off(kind, settings))


def _off(kind: str, settings: dict[str, Any]) -> str | None:
    """Compares an implementation's steps on random numbers with those of torch's plain AdamW.

    For the arguments see `_why_not`. Returns how the steps fail or differ, or None if they are
    right.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, size, generator=generator) for size in _TRIED]
    settings = {**settings, "lr": 1e-2, "weight_decay": 0.05}

    def moved(make: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        rows = [draw.to(distributed.device(), dtype) for draw in draws]
        parameters = [nn.Parameter(row[0].clone()) for row in rows]
        optimizer = make([{"params": parameters}])
        for step in range(1, 4):
            for parameter, row in zip(parameters, rows, strict=True):
                parameter.grad = row[step].clone()
            optimizer.step()
        return torch.cat([p.detach() - row[0] for p, row in zip(parameters, rows, strict=True)])

    def plain(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, foreach=False, **settings)

    exact = moved(plain, torch.float64)
    limit = 4 * (moved(plain, torch.float32) - exact).abs().max() + 1e-6 * exact.abs().max()
    try:
        error = (moved(partial(_made, kind, settings=settings), torch.float32) - exact).abs().max()
    except Exception as failed:  # Whatever a kernel's launch raises.
        return f"its step fails ({type(failed).__name__}: {failed})"
    if error <= limit:
        return None
    return (
        f"its steps differ by {error:.1e} from those of plain AdamW, which are at most "
        f"{exact.abs().max():.1e}"
    )


def _number(owner: Tensor, steps: int) -> int:
    return steps


def _on_device(owner: Tensor, steps: int) -> Tensor:
    # torch's fused kernel wants the count on the parameter's device.
    return torch.tensor(float(steps), dtype=torch.float32, device=owner.device)
