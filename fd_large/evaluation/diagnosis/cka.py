"""Linear CKA between the layers of models, computed minibatch by minibatch.

The features of a layer for an image are flattened to one vector, and X (n, features) has the
vectors of a minibatch as rows. CKA compares the Gram matrices X X^T of two layers. Rotating or
permuting the features does not change a Gram matrix, so layers of any two models can be compared.

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
    """Returns the Gram matrix X X^T of n images with a zero diagonal, (n, n) float64.

    Args:
        features: Features of the n images, (n, ...), which are flattened to one vector for each
            image and centred, to give X.
    """
    x = features.flatten(1).float()
    # The estimate does not change with a shift; products of centred numbers lose fewer digits.
    x = x - x.mean(0)
    products = (x @ x.T).double()
    return products.fill_diagonal_(0.0)


def hsic(k: Tensor, m: Tensor) -> Tensor:
    """Returns the unbiased estimate of the Hilbert-Schmidt independence criterion.

    Args:
        k: Gram matrices (..., n, n) with a zero diagonal; n is at least 4.
        m: Gram matrices of the same images, which are broadcast against k.

    Returns: the estimates, (...).
    """
    n = k.shape[-1]
    assert n >= LEAST_IMAGES
    trace = (k * m).sum((-2, -1))
    whole = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
    rows = (k.sum(-1) * m.sum(-1)).sum(-1) * 2 / (n - 2)
    return (trace + whole - rows) / (n * (n - 3))


class Similarity:
    """CKA between all layers of all models, accumulated over minibatches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, grams: Sequence[Tensor]) -> None:
        """Adds a minibatch.

        Args:
            grams: The Gram matrix (n, n) float64 of each layer of each model, in a fixed order.
                All are of the same n images; n is at least 4.
        """
        stacked = torch.stack(list(grams))  # (L, n, n)
        sums = torch.stack([hsic(row, stacked) for row in stacked])  # (L, L)
        self._sums = sums if self._sums is None else self._sums + sums

    def matrix(self) -> Tensor:
        """Returns the CKA of all pairs of the L layers: (L, L) float64, with 1 on the diagonal.

        The entries of a layer are NaN if its features are the same for all images.
        """
        assert self._sums is not None
        norms = self._sums.diagonal().clamp(min=0).sqrt()
        return self._sums / (norms[:, None] * norms[None, :])
