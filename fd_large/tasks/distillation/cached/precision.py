"""How a teacher's map is stored in a cache: as it is, or in 16 or 8 bits.

In all but fp32 each token is stored less a shift and divided by a factor, both float32 and the
token's own. So no channel is too large for a format, a token of any size keeps its digits, and no
statistics of the dataset are needed. Under fp16 and fp8 (E4M3) they are mean and deviation of the
token, as in whitening; under int8 the middle and a 254th of its range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class Stored(NamedTuple):
    """Tokens as a cache holds them.

    Attributes:
        values: (..., N, C), of the precision's type.
        scales: (..., N, 2) float32, shift and factor of each token; (..., N, 0) under fp32.
    """

    values: Tensor
    scales: Tensor


def num_scales(precision: str) -> int:
    """Returns how many numbers are stored beside each token."""
    return 0 if precision == "fp32" else 2


def encode(tokens: Tensor, precision: str) -> Stored:
    """Returns tokens as they are stored.

    Args:
        tokens: (..., N, C), float32 or a narrower type.
        precision: A name in `PRECISIONS`.
    """
    tokens, dtype = tokens.float(), PRECISIONS[precision]
    if not num_scales(precision):
        return Stored(tokens, tokens.new_empty(*tokens.shape[:-1], 0))
    if precision == "int8":
        low, high = tokens.aminmax(dim=-1, keepdim=True)
        shift, factor = (high + low) / 2, (high - low) / 254
    else:
        shift = tokens.mean(-1, keepdim=True)
        factor = (tokens - shift).square().mean(-1, keepdim=True).sqrt()
    factor = torch.where(factor > 0, factor, 1.0)
    scaled = (tokens - shift) / factor
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max  # Beyond it E4M3 has no infinity, but NaN.
        values = scaled.clamp(-most, most).to(dtype)
    else:
        values = scaled.round().clamp(-127, 127).to(dtype)
    return Stored(values, torch.cat([shift, factor], -1))


def decode(stored: Stored, dtype: torch.dtype) -> Tensor:
    """Returns stored tokens, (..., N, C), in the type in which the teacher gave them."""
    values, scales = stored
    if not scales.shape[-1]:
        return values.to(dtype)
    shift, factor = scales[..., :1], scales[..., 1:]
    return (shift + factor * values.float()).to(dtype)
