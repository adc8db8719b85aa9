"""What logs and reports call the numbers of a distillation."""

from __future__ import annotations

from collections.abc import Mapping

from fd_large.tasks.distillation.losses import make_loss
from fd_large.tasks.distillation.section import NamedTeacher, Objective, labels_of

_WORDS = {
    "held_out/loss": "held-out loss",
    "held_out/cosine": "held-out cosine",
    "held_out/best_constant": "held-out constant-prediction baseline",
    "unseen_crops/loss": "unseen-crops loss",
    "unseen_crops/cosine": "unseen-crops cosine",
    "unseen_crops/best_constant": "unseen-crops constant-prediction baseline",
    "test/knn": "test k-NN accuracy (%)",
}


def metric_words(teachers: Mapping[str, NamedTeacher], objective: Objective) -> dict[str, str]:
    """Returns the words for each number, as `Job.metrics` has them.

    Args:
        teachers: Several teachers by name; empty: there is one, which `objective` describes.
        objective: What is learnt of the only teacher; its loss brings a word of its own.
    """
    if not teachers:
        return {"loss": make_loss(objective.loss, beta=objective.beta).label, **_WORDS}
    words = {"loss": "sum of the losses", **_WORDS}
    for target in labels_of(teachers):
        said = target.replace("_", " ")
        for images in ("held_out", "unseen_crops"):
            for name in ("loss", "cosine", "best_constant"):
                words[f"{images}/{target}_{name}"] = f"{_WORDS[f'{images}/{name}']} ({said})"
    return words
