"""Chooses the default recipe by which a model is fine-tuned."""

from __future__ import annotations

from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.registry import RECIPES

# Smallest width of the first stage for each recipe; Swin-B has 128, L 192, 1B 448 and G 512.
_LARGE = ((352, "finetune_swinv2_giant"), (192, "finetune_swinv2_large"))


def recipe_name(architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
    """Returns the name of the recipe that fine-tunes a model if the user names no recipe.

    Args:
        architecture: Architecture of the model.
        run_recipe: Name of the recipe of the run that trained the model; "" for random weights;
            None for weights from elsewhere, such as the weights of a teacher.
    """
    finetune_name = (run_recipe or "").replace("fd_", "finetune_", 1)
    if finetune_name in RECIPES and RECIPES[finetune_name]().task.name == "finetune":
        return finetune_name
    # Not every family states its width.
    width = getattr(architecture, "embed_dim", 0)
    if architecture.is_hierarchical:
        return next((name for least, name in _LARGE if width >= least), "finetune_esvit_swin_base")
    large = width >= 1024
    name = "finetune_clip_vit_large" if large else "finetune_clip_vit_base"
    return f"{name}_plain" if run_recipe is None else name
