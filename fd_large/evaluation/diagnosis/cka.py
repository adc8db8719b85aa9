"""Linear CKA between the layers of models, minibatch by minibatch.

A layer's features of an image, whatever their layout, are one vector; X (n, features) has the
vectors of a minibatch. CKA compares the Gram matrices X X^T of two layers, which are invariant
under rotation and layout of the features, so layers of any two models can be compared.

Source: Kornblith et al., arXiv 1905.00414; the unbiased estimate of HSIC, Song et al., JMLR 2012,
and its mean over minibatches, Nguyen et al., arXiv 2010.15327.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The unbiased estimate divides by n (n - 3).
LEAST_IMAGES = 4


def gram(features: Tensor) -> Tensor:
    """Returns X X^T of centred features (n, ...) with a diagonal of zeros, (n, n) float64."""
    x = features.flatten(1).float()
    # The estimate does not change with a shift; products of centred numbers lose fewer digits.
    x = x - x.mean(0)
    products = (x @ x.T).double()
    return products.fill_diagonal_(0.0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Estimates the Hilbert-Schmidt independence criterion of two Gram matrices, unbiased.

    Args:
        k: (..., n, n), diagonal 0, n at least 4.
        m: Likewise, broadcast against k.

    Returns: (...).
    """
    n = k.shape[-1]
    assert n >= LEAST_IMAGES
    trace = (k * m).sum((-2, -1))
    whole = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
    rows = (k.sum(-1) * m.sum(-1)).sum(-1) * 2 / (n - 2)
    return (trace + whole - rows) / (n * (n - 3))


class Similarity:
    """CKA between all layers of all models, added up over minibatches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, grams: Sequence[Tensor]) -> None:
        """Adds a minibatch.

        Args:
            grams: Gram matrices (n, n) float64 of the same n images, at least 4: a matrix for
                each layer of each model, in a fixed order.
        """
        stacked = torch.stack(list(grams))  # (L, n, n)
        sums = torch.stack([hsic(row, stacked) for row in stacked])  # (L, L)
        self._sums = sums if self._sums is None else self._sums + sums

    def matrix(self) -> Tensor:
        """Returns CKA of all pairs of layers: (L, L) float64, 1 on the diagonal.

        NaN for a layer that is the same for all images.
        """
        assert self._sums is not None
        norms = self._sums.diagonal().clamp(min=0).sqrt()
        return self._sums / (norms[:, None] * norms[None, :])
