"""The columns of `transfer`: tasks, recipes and the paper's figures.

To add a column, add an entry to `COLUMNS` and, if its dataset is new, a flag for it (table.py).

Source of the figures: Wei et al., arXiv 2205.14141. Those of CLIP ViT-B/16 are in Table 1 of the
ICCV version. The others are in the repository's README and, for ADE20K, in a summary of the third
version.
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
    """A metric of a finished run.

    Attributes:
        key: Name in summary.json.
        title: Its name in the table, with the unit.
        scale: Factor for the table.
        digits: Digits after the point.
        lower_is_better: Whether less is better.
    """

    key: str
    title: str
    scale: float = 1.0
    digits: int = 1
    lower_is_better: bool = False


class Published(NamedTuple):
    """The paper's figures of a student and of its teacher, for each score.

    Attributes:
        student: The figures of the student.
        teacher: The figures of the teacher.
        recipe: The recipe of this package that has the paper's settings for the student; empty:
            the paper does not publish them.
    """

    student: Figures
    teacher: Figures
    recipe: str = ""


class Column(NamedTuple):
    """A task on which every model of the table is trained and tested.

    Attributes:
        name: Name on the command line and of its folders.
        data: The flag that names its dataset.
        title: Heading of the column.
        images: Training images of the published dataset, which decide the steps of an epoch.
        scores: Reported metrics.
        recipes: Prefixes of the names of its recipes; empty: the recipe that fine-tuning chooses
            for the model.
        published: The paper's figures, by the recipe of the distillation.
        held_out: Name in summary.json of the first score on held-out images, by which `--sweep`
            chooses; empty: `--sweep` does not apply.
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
        """The score by which `--sweep` chooses: the first one."""
        first = self.scores[0]
        return Metric(self.held_out, itemgetter(first.key), first.lower_is_better)

    @property
    def is_of_one_kind(self) -> bool:
        """Whether each of its recipes is for one kind of models, ViT or Swin."""
        kinds = {registry.get(n).student_architecture().is_hierarchical for n in self._names()}
        return len(kinds) > 1

    def _names(self) -> list[str]:
        """Returns the names of its recipes."""
        return [name for name in registry.RECIPES if self.recipes and name.startswith(self.recipes)]

    def recipe(self, architecture: FamilyArchitecture, run_recipe: str | None) -> str:
        """Returns the recipe whose model is nearest in kind, then in width and depth.

        Args:
            architecture: Architecture of the trained model.
            run_recipe: As in `Transfer.recipe_for`.
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
    """Returns the width and the depth, each 0 if only a library knows it."""
    return getattr(architecture, "embed_dim", 0), sum(getattr(architecture, "depths", ()))


def _ratio(a: int, b: int) -> float:
    """Returns the distance between two sizes; 0 if a size is unknown."""
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
"""The columns in the order of the table, by name."""
