"""Losses between similarities: of a summary to those of other images, of a token to its neighbours.

Each compares two distributions, softmaxes of cosines: the student's is pulled towards the
teacher's by the Kullback-Leibler divergence. Source: distillation in lightly-train, version 1
(against a queue) and version 3 (between the tokens of an image too).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07


def units(tokens: Tensor) -> Tensor:
    """Returns tokens (..., C) of length 1."""
    return F.normalize(tokens, dim=-1)


def queue_divergence(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    """Returns the divergence of each image between similarities to the summaries of a queue, (B,).

    Args:
        student: (B, C) of length 1.
        teacher: (B, C) of length 1; takes no gradient.
        queue: (Q, C), rows of length 1 or of zeros, which take part as they are.
    """
    return _divergence(student @ queue.T, teacher @ queue.T)


def relation_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the divergence of each image between similarities of its tokens, (B,).

    It is a mean over tokens, each of which is compared with all of its image, itself included. The
    widths of the two may differ.

    Args:
        student: (B, N, Cs) of length 1.
        teacher: (B, N, Ct) of length 1; takes no gradient.
    """
    return _divergence(student @ student.mT, teacher @ teacher.mT).mean(-1)


def pushed(queue: Tensor, summaries: Tensor) -> Tensor:
    """Returns a queue (Q, C) with the summaries (B, C) of a batch in front, newest first.

    The oldest fall out; of a batch larger than the queue its first ones stay.
    """
    return torch.cat([summaries, queue])[: len(queue)]


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of softmaxes over the last dimension of cosines."""
    log_student = F.log_softmax(student / TEMPERATURE, dim=-1)
    log_teacher = F.log_softmax(teacher.detach() / TEMPERATURE, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
