"""The recipe of fine-tuning that fits a model."""

from __future__ import annotations

from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.registry import RECIPES


def recipe_name(architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
    """Returns the name of the recipe whose settings a model takes where the user names none.

    Args:
        architecture: The model's.
        run_recipe: Name of the recipe of the run whose student it is; "": it has random weights,
            without a run; None: it has weights of its own, as a teacher has.
    """
    own = (run_recipe or "").replace("fd_", "finetune_", 1)
    if own in RECIPES and RECIPES[own]().task.name == "finetune":
        return own
    if architecture.is_hierarchical:
        return "finetune_esvit_swin_base"
    # Not every family states its width.
    large = getattr(architecture, "embed_dim", 0) >= 1024
    name = "finetune_clip_vit_large" if large else "finetune_clip_vit_base"
    return f"{name}_plain" if run_recipe is None else name
