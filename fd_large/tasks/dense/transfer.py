"""Makes recipes of segmentation and depth that begin from models which the user names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel, Student
from fd_large.tasks.dense.job import next_multiple
from fd_large.tasks.transfer import Transfer


class DenseTransfer(Transfer):
    """Makes the recipes of dense tasks, whose crop must fit the patch size of the named model."""

    def starting_from(
        self,
        run: Run,
        model: FrozenModel,
        *,
        image_size: int,
        trained_as: Student | None,
        fields: Collection[str],
    ) -> Run:
        """Returns a recipe whose student is `model`, and whose crop fits this model.

        The side of `run`'s crop is enlarged to a multiple of the patch size. For a model with
        several stages, which accepts crops of any size, the side stays unchanged. The arguments are
        those of `Transfer.starting_from`.
        """
        run = super().starting_from(
            run, model, image_size=image_size, trained_as=trained_as, fields=fields
        )
        architecture = run.student_architecture()
        # Other families do not state a patch, or take any size.
        patch = 1 if architecture.is_hierarchical else getattr(architecture, "patch_size", 1)
        side = next_multiple(run.data.image_size, patch)
        return replace(run, data=replace(run.data, image_size=side))
