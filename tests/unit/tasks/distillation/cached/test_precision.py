"""Maps in fewer bits: what comes back, and how far it is from what was stored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.kernels.whitened_loss import whiten
from fd_large.tasks.distillation.cached.precision import PRECISIONS, decode, encode


def tokens() -> torch.Tensor:
    """Tokens of unlike sizes, far from zero, with a few large channels."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 5, 192, generator=generator)
    drawn[..., :4] *= 30
    return drawn * torch.tensor([1e-3, 1.0, 1e5])[:, None, None] + 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_gives_every_bit_back(dtype):
    given = tokens().to(dtype)
    back = decode(encode(given, "fp32"), dtype)
    assert back.dtype == dtype
    assert torch.equal(back, given)


# The floors of smooth L1 (beta 2) of whitened maps with large channels, by MULTI's measurement:
# 1e-8, 1.6e-4 and 6.4e-4; of int8 the whole range is used here, not one that is symmetric.
@pytest.mark.parametrize(("precision", "floor"), [("fp16", 1e-7), ("fp8", 3e-4), ("int8", 7e-4)])
def test_a_loss_of_stored_maps_is_near_zero(precision, floor):
    given = tokens()
    stored = encode(given, precision)
    assert stored.values.dtype == PRECISIONS[precision]
    lost = F.smooth_l1_loss(whiten(decode(stored, torch.float32)), whiten(given), beta=2.0)
    assert 0 < lost < floor


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_of_one_value_stay(precision):
    given = torch.full((2, 3, 8), -4.0)
    assert torch.equal(decode(encode(given, precision), torch.float32), given)
