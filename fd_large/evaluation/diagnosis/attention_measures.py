"""Measures of attention maps: distance, similarity of heads, and structure of the average map.

Source: distance, Dosovitskiy et al., arXiv 2010.11929 (figure 7) and Raghu et al., arXiv
2108.08810; similarity of heads and average maps, Wei et al., arXiv 2205.14141.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.backbones.token_positions import PADDING, PREFIX, TokenPositions

_MOST_ROUNDS = 500
_CONVERGED = 1e-12


def distances(positions: TokenPositions) -> Tensor:
    """Returns the distance in the image between two tokens of a window: (nW, T, T), in tokens.

    The entries of prefix tokens and of padding are meaningless.

    Args:
        positions: Positions of the T tokens in each of the nW windows.
    """
    rows, columns = positions.index // positions.grid[1], positions.index % positions.grid[1]
    at = torch.stack([rows, columns], dim=-1).float()
    return (at[:, :, None] - at[:, None, :]).square().sum(-1).sqrt()


def among_patches(attention: Tensor, positions: TokenPositions) -> Tensor:
    """Returns the attention to patches alone, (B, nW, h, T, T).

    The attention to prefix tokens and padding is set to 0, and each row is then scaled to a sum of
    1.

    Args:
        attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
        positions: Positions of the tokens.
    """
    there = (positions.index >= 0).to(attention)[None, :, None, None, :]
    masked = attention * there
    return masked / masked.sum(-1, keepdim=True).clamp(min=torch.finfo(masked.dtype).tiny)


def head_distances(attention: Tensor, positions: TokenPositions) -> Tensor:
    """Returns the attention-weighted distance from query to key: (B, h), in tokens.

    The distance is the mean over queries q of sum_k A(q, k) |q - k|, where A is the attention among
    patches. Prefix tokens are neither queries nor keys.

    Args:
        attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
        positions: Positions of the tokens.
    """
    per_query = (among_patches(attention, positions) * distances(positions)[:, None]).sum(-1)
    queries = (positions.index >= 0).to(attention)[:, None, :]  # (nW, 1, T)
    return (per_query * queries).sum((1, 3)) / queries.sum()


def prefix_share(attention: Tensor, positions: TokenPositions) -> Tensor:
    """Returns the share of attention that patches, as queries, pay to prefix tokens: (B, h).

    Args:
        attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
        positions: Positions of the tokens.
    """
    prefix = (positions.index == PREFIX).to(attention)[None, :, None, None, :]
    queries = (positions.index >= 0).to(attention)[:, None, :]
    return ((attention * prefix).sum(-1) * queries).sum((1, 3)) / queries.sum()


def head_similarity(
    attention: Tensor, positions: TokenPositions, *, patches_alone: bool = False
) -> Tensor:
    """Returns the cosine similarity between the maps of two heads, averaged over all pairs: (B,).

    The map of a head for an image is one vector. The result is NaN for a layer with a single head.

    Args:
        attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
        positions: Positions of the tokens.
        patches_alone: Whether to use only the attention among patches. If all heads attend mostly
            to a prefix token, their complete maps are similar even if the maps among patches are
            not.
    """
    batch_size, _, heads = attention.shape[:3]
    if heads == 1:
        return attention.new_full((batch_size,), torch.nan)
    if patches_alone:
        attention = among_patches(attention, positions)
    counted = positions.index >= 0 if patches_alone else positions.index != PADDING
    queries = counted.to(attention)[None, :, None, :, None]
    flat = (attention * queries).transpose(1, 2).flatten(2)  # (B, h, nW * T * T)
    unit = F.normalize(flat, dim=-1)
    cosines = unit @ unit.transpose(1, 2)  # (B, h, h)
    diagonal = cosines.diagonal(dim1=1, dim2=2).sum(1)
    return (cosines.sum((1, 2)) - diagonal) / (heads * (heads - 1))


def average_map(attention: Tensor, positions: TokenPositions) -> Tensor | None:
    """Returns the attention among patches, averaged over heads and complete windows: (B, P, P).

    P is the number of patches of a window, or of the image if the layer has no windows. A window
    is complete if it has no padding and its tokens are adjacent in the image (`positions.whole`).
    The result is None if no window is complete.

    Args:
        attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
        positions: Positions of the tokens.
    """
    if not positions.whole.any():
        return None
    patches = positions.index[positions.whole][0] >= 0
    whole = among_patches(attention, positions)[:, positions.whole].mean((1, 2))
    return whole[:, patches][:, :, patches]


def nearest_offset_map(average: Tensor, window: tuple[int, int]) -> Tensor:
    """Returns the nearest map in which attention depends only on the offset from query to key.

    In a map of this form, the row of a query is a softmax over the window's keys, whose logits
    depend only on the offset. The nearest map has the least Kullback-Leibler divergence from
    `average`, and is found by iterative scaling.

    Args:
        average: (P, P), whose rows are queries and sum to 1.
        window: Rows and columns of the P patches.

    Returns: (P, P) float64.
    """
    average, offset = average.double(), _offsets(window).to(average.device)
    size = int(offset.max()) + 1

    def summed(values: Tensor) -> Tensor:
        sums = values.new_zeros(size)
        return sums.index_add_(0, offset.flatten(), values.flatten())

    target_sums = summed(average)
    per_offset = target_sums / summed(torch.ones_like(average))
    fitted = average
    for _ in range(_MOST_ROUNDS):
        weights = per_offset[offset]
        scale = 1 / weights.sum(1, keepdim=True)
        before, fitted = fitted, weights * scale
        if (fitted - before).abs().max() < _CONVERGED:
            break
        per_offset = target_sums / summed(scale.expand_as(weights))
    return fitted


def translation_score(average: Tensor, window: tuple[int, int]) -> float:
    """Returns the share of an average map that depends only on the offset, from about 0 to 1.

    This is the share of the variance of the P x P entries that `nearest_offset_map` explains:
    1 - (sum of squared residuals / (n - p)) / (sum of squares about the mean / (n - 1)), with n
    entries and p offsets. By this adjustment for degrees of freedom, maps of noise score 0 on
    average.

    Args:
        average: (P, P), whose rows are queries and sum to 1.
        window: Rows and columns of the P patches.

    Returns: the share; 1 for a map without variance, NaN for a window with a single patch.
    """
    average = average.double()
    entries, offsets = average.numel(), (2 * window[0] - 1) * (2 * window[1] - 1)
    if entries == 1:
        return float("nan")
    total = (average - average.mean()).square().sum()
    if total <= 1e-12 * average.square().sum():
        return 1.0
    left = (average - nearest_offset_map(average, window)).square().sum()
    return 1 - float(left / (entries - offsets) / (total / (entries - 1)))


def _offsets(window: tuple[int, int]) -> Tensor:
    """Numbers the offsets from each query (row) to each key (column): (P, P) int64, from 0.

    Equal offsets have the same number.

    Args:
        window: Rows and columns of the P patches.
    """
    rows, columns = window
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


class LayerFigures:
    """Measures of one attention layer, summed over images in constant memory.

    Args:
        name: Name of the attention module in its model.
        stride: Pixels per token, the same in both directions.
    """

    def __init__(self, name: str, stride: float) -> None:
        self.name, self.stride = name, stride
        self.images = 0
        self._positions: TokenPositions | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, attention: Tensor, positions: TokenPositions) -> None:
        """Adds the layer's attention maps for a batch of images to the sums.

        Args:
            attention: (B images, nW windows, h heads, T queries, T keys), of sum 1 over the keys.
            positions: Positions of the tokens.
        """
        self.images += len(attention)
        self._positions = positions = positions.to(attention.device)
        figures = {
            "distance": head_distances(attention, positions),
            "prefix": prefix_share(attention, positions),
            "similarity": head_similarity(attention, positions),
            "patch_similarity": head_similarity(attention, positions, patches_alone=True),
            "average": average_map(attention, positions),
        }
        for name, values in figures.items():
            if values is not None:
                total = values.sum(0, dtype=torch.float64).cpu()
                self._sums[name] = self._sums.get(name, 0) + total

    def average(self) -> Tensor | None:
        """Returns the attention map averaged over images, heads and windows, (P, P) float64.

        P is the number of patches of a window. Only complete windows count (`average_map`); the
        result is None if no window is complete.
        """
        return self._sums["average"] / self.images if "average" in self._sums else None

    def figures(self) -> dict[str, Any]:
        """Returns the layer's measures, {name: plain value}, averaged over images.

        A value is None if the layer does not have the measure, as the similarity of heads of a
        layer with a single head.
        """
        assert self._positions is not None
        average = self.average()
        window = self._positions.window
        score = None if average is None else _or_none(translation_score(average, window))
        spread = None if average is None else float(average.std(correction=0) / average.mean())
        distance = self._sums["distance"] / self.images * self.stride
        return {
            "layer": self.name,
            "heads": len(distance),
            "grid": list(self._positions.grid),
            "window": list(window),
            "pixels_per_token": self.stride,
            "distance_pixels": distance.tolist(),
            "prefix_share": (self._sums["prefix"] / self.images).tolist(),
            "head_similarity": _or_none(float(self._sums["similarity"] / self.images)),
            "patch_similarity": _or_none(float(self._sums["patch_similarity"] / self.images)),
            "translation_score": score,
            "average_variation": spread,
        }


def _or_none(value: float) -> float | None:
    return None if value != value else value
