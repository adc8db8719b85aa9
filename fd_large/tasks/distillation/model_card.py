"""What the card of a distilled student says of its teacher, its loss and its crops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_large.recipes.architectures import full_name
from fd_large.weights.model_card import LOSSES, Learned
from fd_large.weights.origin import Origin, is_random, without_folders

_RANDOM = "**random weights**: a test or a throughput run, nothing was learned from it"
_METRICS = {
    "held_out_loss_start": "held-out loss before training",
    "held_out_loss": "held-out loss",
    "loss_best_constant": "held-out loss of the constant-prediction baseline",
    "held_out_cosine": "held-out cosine to the teacher's map",
}


def learned(recipe: Mapping[str, Any], teacher: Origin, *, teacher_hash: str) -> Learned:
    """Returns the task's part of the card.

    Args:
        recipe: The recipe as recipe.json has it.
        teacher: Where the teacher's weights come from.
        teacher_hash: Hash of the teacher's weights.
    """
    model = without_folders(full_name(recipe["teacher"]))
    source = recipe["teacher"]["source"]
    data = recipe["data"]
    return Learned(
        title=f"distilled from {model}",
        intro="An image backbone that learned the feature map of a frozen teacher (feature "
        "distillation, arXiv 2205.14141): no labels, no head.",
        tag="feature-distillation",
        tables={
            "Teacher": {
                "model": model,
                "weights": _RANDOM if is_random(source) else without_folders(source),
                "hash of its weights": teacher_hash,
            }
        },
        recipe={"loss": _loss(recipe["objective"])},
        data={
            "crops": f"{data['image_size']} px, {data['min_crop_scale']:g} to 1 of the area, "
            "flipped"
        },
        metrics=LOSSES | _METRICS,
        origins={"the teacher's weights": teacher},
    )


def _loss(objective: Mapping[str, Any]) -> str:
    """The loss in words: the published one, or the names in the recipe."""
    names = {name: objective[name] for name in ("loss", "normaliser", "head")}
    if tuple(names.values()) == ("smooth_l1", "whitening", "linear"):
        return f"smooth L1 (beta {objective['beta']:g}) to the whitened map"
    return ", ".join(f"{name} {without_folders(value)}" for name, value in names.items())
