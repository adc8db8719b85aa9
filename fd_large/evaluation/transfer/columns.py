"""Columns of the table of `transfer`, with their tasks, recipes and the paper's scores.

To add a column, add an entry to `COLUMNS` and, for a new dataset, a flag in table.py.

Source of the scores: Wei et al., arXiv 2205.14141. The scores of CLIP ViT-B/16 are in Table 1 of
the paper's ICCV version. The others are in the README of SwinTransformer/Feature-Distillation and,
for ADE20K, in a summary of the paper's third version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import NamedTuple

from fd_large.evaluation.sweep import Metric
from fd_large.recipes import registry
from fd_large.recipes.dataset_sizes import ADE20K, COCO, IMAGENET, NYUV2
from fd_large.recipes.family import FamilyArchitecture
from fd_large.tasks.classification.recipe_name import recipe_name

Figures = tuple[float, ...]


class Score(NamedTuple):
    """Metric of a finished run.

    Attributes:
        key: Name in the run's summary.json.
        title: Name in the table, with the unit.
        scale: Factor between the value in summary.json and the value in the table.
        digits: Number of digits after the decimal point in the table.
        lower_is_better: Whether a lower value is better.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 1
    lower_is_better: bool = False


class Published(NamedTuple):
    """Published scores of a student and of its teacher in a column.

    Attributes:
        student: The student's value of each score of the column.
        teacher: The teacher's value of each score of the column.
        recipe: Name of this package's recipe with the paper's settings for the student; empty if
            the paper does not publish the settings.
    """

    student: Figures
    teacher: Figures
    recipe: str = ""


class Column(NamedTuple):
    """Column of the table, which is a task on which every model is trained and tested.

    Attributes:
        name: Name on the command line and of the column's folders.
        data: Name of the flag for the dataset.
        title: Heading of the column.
        images: Number of training images of the published dataset, which decides the steps of an
            epoch in a plan.
        scores: The reported metrics.
        recipes: Prefixes of the names of the column's recipes; empty for the recipe that
            `evaluate --task finetune` chooses for the model.
        published: The paper's scores, by the recipe of the distillation.
        held_out: Name in summary.json of the first metric on held-out images, by which `--sweep`
            chooses; empty if `--sweep` does not apply to the column.
    """

    name: str
    data: str
    title: str
    images: int
    scores: tuple[Score, ...]
    recipes: tuple[str, ...]
    published: Mapping[str, Published]
    held_out: str = ""

    @property
    def metric(self) -> Metric:
        """The metric by which `--sweep` chooses: the column's first score, on held-out images."""
        first = self.scores[0]
        return Metric(self.held_out, itemgetter(first.key), first.lower_is_better)

    @property
    def is_of_one_kind(self) -> bool:
        """Whether the column has separate recipes for ViT and for Swin models."""
        kinds = {registry.get(n).student_architecture().is_hierarchical for n in self._names()}
        return len(kinds) > 1

    def _names(self) -> list[str]:
        """Returns the names of the column's recipes; none if `recipes` is empty."""
        return [name for name in registry.RECIPES if self.recipes and name.startswith(self.recipes)]

    def recipe(self, architecture: FamilyArchitecture, run_recipe: str | None) -> str:
        """Returns the name of the column's recipe whose model is most similar to a model.

        Recipes for the same kind of model (ViT or Swin) come first, then the recipe whose model is
        nearest in width, and then in depth. In a column with `recipes` empty, the result is the
        recipe that `evaluate --task finetune` chooses.

        Args:
            architecture: Architecture of the trained model.
            run_recipe: Name of the recipe of the run that trained the model; "" if the model has
                random weights, which no run trained; None if the weights come from elsewhere.
        """
        if not self.recipes:
            return recipe_name(architecture, run_recipe=run_recipe)

        def distance(name: str) -> tuple[bool, float, float]:
            other = registry.get(name).student_architecture()
            (width, depth), (own_width, own_depth) = _size(other), _size(architecture)
            differs = other.is_hierarchical != architecture.is_hierarchical
            return differs, _ratio(width, own_width), _ratio(depth, own_depth)

        return min(self._names(), key=distance)


def _size(architecture: FamilyArchitecture) -> tuple[int, int]:
    """Returns `embed_dim`, the width, and the sum of `depths`, the number of blocks.

    A value is 0 if the architecture does not have the field, as for models of timm.
    """
    return getattr(architecture, "embed_dim", 0), sum(getattr(architecture, "depths", ()))


def _ratio(a: int, b: int) -> float:
    """Returns |log(a / b)| for two sizes, or 0 if `a` or `b` is 0, which means unknown."""
    return abs(math.log(a / b)) if a and b else 0.0


COLUMNS = {
    column.name: column
    for column in (
        Column(
            "finetune",
            "imagenet",
            "ImageNet fine-tuning",
            IMAGENET,
            (Score("test_top1", "fine-tuned, top-1 %"),),
            (),
            {
                "fd_clip_vit_base": Published((85.0,), (82.9,), "finetune_clip_vit_base"),
                "fd_clip_vit_large": Published((87.7,), (86.1,), "finetune_clip_vit_large"),
                "fd_dino_vit_base": Published((83.8,), (82.8,), "finetune_dino_vit_base"),
                "fd_deit_vit_base": Published((83.0,), (81.8,), "finetune_deit_vit_base"),
                "fd_esvit_swin_base": Published((85.1,), (83.9,), "finetune_esvit_swin_base"),
                "fd_swinv2g": Published((89.4,), (89.2,)),
            },
            "held_out_accuracy",
        ),
        Column(
            "linear",
            "imagenet",
            "ImageNet linear probe",
            IMAGENET,
            (Score("test_top1", "linear, top-1 %"),),
            ("linear_probe",),
            {
                "fd_clip_vit_base": Published((80.1,), (79.5,)),
                "fd_dino_vit_base": Published((76.1,), (78.2,)),
            },
        ),
        Column(
            "ade20k",
            "ade20k",
            "ADE20K segmentation",
            ADE20K,
            (Score("val_mIoU", "ADE20K, mIoU %"),),
            ("ade20k_upernet_",),
            {
                "fd_clip_vit_base": Published((51.7,), (49.5,)),
                "fd_clip_vit_large": Published((55.7,), (53.5,)),
                "fd_dino_vit_base": Published((47.7,), (46.2,)),
                "fd_deit_vit_base": Published((48.0,), (47.0,)),
                "fd_esvit_swin_base": Published((48.9,), (47.3,)),
                "fd_swinv2g": Published((61.4,), (59.9,)),
            },
            "held_out_mIoU",
        ),
        Column(
            "coco",
            "coco",
            "COCO detection",
            COCO,
            (
                Score("box_AP", "COCO, box AP", scale=100.0),
                Score("mask_AP", "COCO, mask AP", scale=100.0),
            ),
            ("coco_mask_rcnn_",),
            {"fd_clip_vit_base": Published((48.2, 42.5), (45.0, 39.8))},
            "held_out_box_AP",
        ),
        Column(
            "nyuv2",
            "nyuv2",
            "NYUv2 depth",
            NYUV2,
            (Score("val_rmse", "NYUv2, RMSE m", digits=3, lower_is_better=True),),
            ("nyuv2_vit_", "nyuv2_swinv2_"),
            {"fd_clip_vit_base": Published((0.352,), (0.416,))},
            "held_out_rmse",
        ),
    )
}
"""The columns by name, in the order of the table."""
