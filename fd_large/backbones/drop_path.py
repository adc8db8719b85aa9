"""Stochastic depth as an explicit input: a mask of kept residual branches by sample.

Nothing is drawn here. `keep` comes from the data's counter-based generator, so that ranks,
accumulation and recomputation cannot change it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fd_large.errors import ShapeError


def linear_rates(rate: float, num_blocks: int) -> tuple[float, ...]:
    """Returns one rate per site, two sites a block, rising linearly from 0 to `rate`."""
    per_block = np.linspace(0.0, rate, num_blocks)
    return tuple(float(r) for r in np.repeat(per_block, 2))


def branch_scales(
    keep: Tensor | None, rates: tuple[float, ...], batch_size: int, device: torch.device
) -> Tensor | None:
    """Returns the factor of each branch and sample, kept / (1 - rate): (num_sites, B) float32.

    Args:
        keep: (num_sites, B), bool or 0-1; None without drop path, which makes the result None.
        rates: Drop rate of each site.
        batch_size: B, the number of images.
        device: Device of the images.

    Raises: ShapeError: if keep does not fit sites and batch.
    """
    if keep is None:
        return None
    if keep.shape != (len(rates), batch_size):
        raise ShapeError(
            f"drop path: keep must have a row per site and a column per image; got "
            f"{tuple(keep.shape)}, expected {(len(rates), batch_size)}. Draw it for "
            "the model's drop_path_rates and this batch."
        )
    return keep.to(device, torch.float32) / _kept_shares(rates, device)


@lru_cache(maxsize=64)
def _kept_shares(rates: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy from host memory in every forward would make the GPU wait.
    with torch.inference_mode(False):
        shares = 1.0 - np.asarray(rates, dtype=np.float64)[:, None]
        return torch.from_numpy(shares.astype(np.float32)).to(device)
