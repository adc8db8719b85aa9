"""Drop path (stochastic depth) by a mask that is an input of the model.

The mask `keep` says which residual branches of each image are kept. The mask is not drawn here but
by the data's counter-based generator, so that ranks, accumulation and recomputation cannot change
the mask.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fd_large.errors import ShapeError


def linear_rates(rate: float, num_blocks: int) -> tuple[float, ...]:
    """Returns the drop rate of each residual branch of `num_blocks` blocks, which have two each.

    The rates rise linearly from 0 in the first block to `rate` in the last.
    """
    per_block = np.linspace(0.0, rate, num_blocks)
    return tuple(float(r) for r in np.repeat(per_block, 2))


def branch_scales(
    keep: Tensor | None, rates: tuple[float, ...], batch_size: int, device: torch.device
) -> Tensor | None:
    """Returns the factor keep / (1 - rate) of each branch and image, (num_branches, B) float32.

    Args:
        keep: (num_branches, B), bool or 0-1, or None without drop path; then the result is None.
        rates: Drop rate of each branch.
        batch_size: B, the number of images.
        device: Device of the images.

    Raises: ShapeError: if the shape of `keep` is not (num_branches, B).
    """
    if keep is None:
        return None
    if keep.shape != (len(rates), batch_size):
        raise ShapeError(
            f"drop path: keep must have a row per site and a column per image; got "
            f"{tuple(keep.shape)}, expected {(len(rates), batch_size)}. Draw keep for the model's "
            "drop_path_rates and this batch."
        )
    return keep.to(device, torch.float32) / _kept_shares(rates, device)


@lru_cache(maxsize=64)
def _kept_shares(rates: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy from host memory in every forward would make the GPU wait.
    with torch.inference_mode(False):
        shares = 1.0 - np.asarray(rates, dtype=np.float64)[:, None]
        return torch.from_numpy(shares.astype(np.float32)).to(device)
