"""What logs and reports call the numbers of a distillation."""

from __future__ import annotations

from collections.abc import Mapping

from fd_large.tasks.distillation.losses import make_loss
from fd_large.tasks.distillation.section import NamedTeacher, Objective, evaluated_words


def metric_words(teachers: Mapping[str, NamedTeacher], objective: Objective) -> dict[str, str]:
    """Returns the words for each number, as `Job.metrics` has them.

    Args:
        teachers: Several teachers by name; empty: there is one, which `objective` describes.
        objective: What is learnt of the only teacher; its loss brings a word of its own.
    """
    label = "sum of the losses"
    if not teachers:
        label = make_loss(objective.loss, beta=objective.beta).label
    return {"loss": label, **evaluated_words(teachers)}
