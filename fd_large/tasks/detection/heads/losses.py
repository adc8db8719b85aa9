"""Sums of losses to the loss of a rank.

Each term is a sum over what was looked at, divided by how much that was on all ranks together: the
gradient of an image then does not depend on which rank it is on, nor on what else is there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fd_large import distributed

# What each term is a mean over.
NORMALISERS = {
    "rpn_cls": "anchors",
    "rpn_box": "anchors",
    "cls": "boxes",
    "box": "boxes",
    "mask": "positives",
}


def combine(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of this rank and its terms; a collective.

    DeepSpeed averages gradients over the ranks, so a rank's sum is divided by the ranks' mean
    count: the average over the ranks is then the sum over all of them through the count of all.

    Args:
        sums: Scalar float32 by the names in NORMALISERS.
        counts: Scalars by the names of the normalisers: what this rank looked at.

    Returns: the loss and the detached terms, whose means over the ranks are those of the batch.
    """
    names = sorted(counts)
    own = torch.stack([counts[name].float() for name in names])
    # A batch in which nothing was looked at has sums of 0.
    means = (distributed.sum_tensor(own).clamp(min=1) / distributed.world_size()).unbind()
    divisors = dict(zip(names, means, strict=True))
    terms = {name: sums[name] / divisors[NORMALISERS[name]] for name in NORMALISERS}
    return torch.stack(list(terms.values())).sum(), {k: v.detach() for k, v in terms.items()}
