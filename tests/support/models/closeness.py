"""How close a kernel comes to a float64 reference, and a run to one with sums in another order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Numbers = Sequence[float] | np.ndarray | Tensor


def assert_close(name: str, got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Fails where a result is further off than its dtype allows.

    float32: 1e-5 of 1 or of the largest value. bfloat16, and float32 that a bfloat16 on the way has
    taken beyond that in eager torch too: twice the largest error of same-precision eager torch plus
    one unit of bfloat16 in the last place (the interpreter truncates where a GPU rounds).
    """
    assert got.dtype == eager.dtype, name
    assert got.shape == exact.shape, name
    error = (got.double() - exact).abs()
    bound = torch.full_like(exact, 1e-5 * max(1.0, exact.abs().max().item()))
    of_eager = (eager.double() - exact).abs().max()
    if got.dtype == torch.bfloat16 or of_eager > bound.max():
        magnitude = torch.maximum(exact.abs(), got.double().abs()).clamp(min=2.0**-126)
        bound = 2 * of_eager + torch.exp2(torch.floor(torch.log2(magnitude)) - 7)
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (
        f"{name}: {got.flatten()[worst].item()} for {exact.flatten()[worst].item()}, "
        f"off by {error.flatten()[worst].item():.3g}, bound {bound.flatten()[worst].item():.3g}"
    )


def distance(found: Numbers, expected: Numbers) -> float:
    """Largest difference of two series or tensors, relative to the largest number expected.

    Sums in another order differ by the rounding of what they had to hold. A loss that has fallen
    still has the rounding of the large ones before it, by way of the weights, and a gradient that
    cancels that of its parts: neither is a measure of its own error. Returns nan where a number
    is: no bound holds then.
    """
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    assert ours.shape == theirs.shape
    if torch.equal(ours, theirs):
        return 0.0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
