"""Weighted k-NN: predicts an image's class by the votes of the most similar training images.

A neighbour votes for its own class with weight exp(cosine similarity / temperature).

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination",
arXiv 1805.01978, section 3.4; Caron et al. (DINO), arXiv 2104.14294, eval_knn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fd_large.probes.features import Features
from fd_large.ranks import distributed

# A block of similarities is QUERY_BLOCK x BANK_BLOCK float32: 67 MB.
QUERY_BLOCK, BANK_BLOCK = 1024, 16_384


class Bank:
    """Features and labels of the training images that vote, read in blocks.

    Args:
        features: Features of the training images; images without a label are left out.
        num_classes: Number of classes, K.
    """

    def __init__(self, features: Features, num_classes: int) -> None:
        self._features, self._usable = features, features.usable()
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._usable)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the training images that have a label in blocks of at most `BANK_BLOCK` images.

        A block is the pair (features scaled to unit L2 norm, (M, C) float32; labels, (M,) int64),
        on this rank's device.
        """
        for start in range(0, len(self), BANK_BLOCK):
            numbers = self._usable[start : start + BANK_BLOCK]
            yield _unit(self._features.rows[numbers]), _labels(self._features, numbers)


def predict(rows: Tensor, bank: Bank, *, k: int, temperature: float) -> Tensor:
    """Predicts the classes of images by the votes of their nearest training images.

    Args:
        rows: Features of the images, (Q, C) float32.
        bank: The training images, which vote.
        k: Number of neighbours; if there are fewer training images, all of them vote.
        temperature: A neighbour's vote is exp(cosine similarity / temperature).

    Returns: the predicted classes, (Q,) int64; on a tie, the class with the lowest number.
    """
    queries = _unit(rows)
    best = queries.new_empty(len(rows), 0)
    classes = torch.empty(len(rows), 0, dtype=torch.int64, device=queries.device)
    for block, labels in bank.blocks():
        similar = torch.cat([best, queries @ block.T], 1)
        candidates = torch.cat([classes, labels.expand(len(rows), -1)], 1)
        best, places = similar.topk(min(k, similar.shape[1]), dim=1)
        classes = candidates.gather(1, places)
    # Votes are relative to the nearest neighbour's, since exp would overflow at a low temperature.
    votes = ((best - best[:, :1]).double() / temperature).exp()
    totals = torch.zeros(len(rows), bank.num_classes, dtype=torch.float64, device=votes.device)
    return totals.scatter_add_(1, classes, votes).argmax(1)


def classify(
    train: Features,
    test: Features,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    progress: Callable[[int], None] = lambda count: None,
    between: Callable[[], None] = lambda: None,
) -> NDArray[np.int64]:
    """Returns the predicted class of each test image, on every rank; a collective.

    Blocks of test images are distributed over the ranks, and each block is computed in the same way
    on any number of ranks.

    Args:
        train: Features of the training images, which vote.
        test: Features of the test images.
        num_classes: Number of classes, K.
        k: Number of neighbours.
        temperature: A neighbour's vote is exp(cosine similarity / temperature).
        progress: Called after each block of this rank with the block's number of images.
        between: Called before each block on every rank; may raise to stop.

    Returns: (N,) int64; 0 for a test image without a label.
    """
    bank, usable = Bank(train, num_classes), test.usable()
    predicted = torch.zeros(len(test.labels), dtype=torch.int64)
    offset = QUERY_BLOCK * distributed.rank()
    for first in range(0, len(usable), QUERY_BLOCK * distributed.world_size()):
        between()
        numbers = usable[first + offset : first + offset + QUERY_BLOCK]
        if not len(numbers):
            continue
        rows = torch.from_numpy(test.rows[numbers])
        classes = predict(rows, bank, k=k, temperature=temperature)
        predicted[torch.from_numpy(numbers)] = classes.cpu()
        progress(len(numbers))
    return distributed.sum_tensor(predicted).numpy()


def _unit(rows: Tensor | NDArray[np.float32]) -> Tensor:
    """Returns each row of `rows`, (M, C), scaled to unit L2 norm, on this rank's device."""
    tensor = torch.as_tensor(rows).to(distributed.device())
    return F.normalize(tensor, dim=1)


def _labels(features: Features, numbers: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(features.labels[numbers]).to(distributed.device())
