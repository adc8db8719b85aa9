"""A loss of the user's own: --objective.loss module:cosine.py:cosine."""

import torch.nn.functional as F


def cosine(projected, target):
    """1 - cosine of each token of (..., C) float32 and its target, averaged to a scalar."""
    return 1 - F.cosine_similarity(projected, target, dim=-1).mean()
