"""Fine-tunings and linear probes that begin from named models, and how they are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fd_large.data.folder import ImageFolder
from fd_large.data.labelled import open_split
from fd_large.data.val_fraction import places_of
from fd_large.engine.job import TrainingJob
from fd_large.engine.student import OWN_FIELDS, as_student, make_student, refuse_decided
from fd_large.errors import DataError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import override
from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel, Student
from fd_large.tasks.classification.job import own_section, with_statistics
from fd_large.tasks.classification.recipe_name import recipe_name
from fd_large.tasks.transfer import Divisible, Transfer


class ClassificationTransfer(Transfer):
    """Makes the recipes of fine-tunings that begin from models which the user names."""

    def starting_from(
        self,
        run: Run,
        model: FrozenModel,
        *,
        image_size: int,
        trained_as: Student | None,
        fields: Collection[str],
    ) -> Run:
        """Returns a recipe whose student is `model`, on images of the side `image_size`.

        The image statistics are those of the model, unless `run` states some. The student's other
        fields are those of the run that trained the model; drop path and the fields that the user
        set stay those of `run`. Every block gets its own copy of a position bias that blocks share.
        The arguments are those of `Transfer.starting_from`.
        """
        refuse_decided(fields, OWN_FIELDS)
        architecture = resolve(model.model, model.architecture).with_own_position_biases()
        if architecture.resizes_positions:
            architecture = architecture.at(image_size)
        student_fields = {name: getattr(run.student, name) for name in {"drop_path_rate", *fields}}
        section = replace(trained_as or Student(model=model.model), **student_fields)
        student = as_student(model, architecture, section, trained_as=trained_as)
        if student.init and not own_section(run).statistics:
            run = with_statistics(run, model.statistics)
        return replace(run, student=student, data=replace(run.data, image_size=image_size))

    def recipe_for(self, architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
        """Returns the name of the recipe that fine-tunes a model if the user names no recipe.

        Args:
            architecture: Architecture of the model.
            run_recipe: Name of the recipe of the run that trained the model; "" if the model has
                random weights; None if the weights come from elsewhere.
        """
        return recipe_name(architecture, run_recipe=run_recipe)

    def divisible(self, job: TrainingJob) -> Divisible:
        """Opens the training images, in train/ of `data.root`, of which a part can be held out.

        A run that holds out a part of these images by `data.val_fraction` has train/ as its
        `data.root`.

        Args:
            job: A job whose recipe names the images.

        Raises: DataError: if the images cannot be divided by the names of their files.
        """
        data = job.run.data
        images = open_split(data.root, "train").images
        if not isinstance(images, ImageFolder):
            raise DataError(
                "--sweep: only a folder of images can be divided by file names; got "
                f"{type(images).__name__} for data.root, expected train/ with a folder for each "
                "class. Leave --sweep out, and set a learning rate by --optim.base_lr."
            )
        # Refuses a fraction that leaves a part empty.
        places_of(images, "train", data.val_fraction, where="data.root")
        return Divisible(images.root, images, images.fingerprint)

    def compared(self, summary: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Returns the metrics of a finished run that the command `evaluate` compares.

        Args:
            summary: Content of the run's summary.json.

        Returns: the top-1 accuracy on the test images in per cent, and {"test_loss": loss}.
        """
        return summary["test_top1"], {"test_loss": summary["test_loss"]}


class LinearTransfer(ClassificationTransfer):
    """Makes the recipes of linear probes on models which the user names."""

    def variants(self, run: Run, pool: str) -> Mapping[str, Run]:
        """Returns {label: recipe} of the linear probes of a model.

        If `pool` is "auto" and the model has a class token, there are three recipes, which probe
        the mean of the patch tokens, the class token, and the two concatenated. If `pool` is "auto"
        and the model has no class token, there is only `run`, with the label "". If `pool` is
        another value, there is only `run` with this value of `task.linear.pool`, with the label "".

        Args:
            run: The recipe, with the model in the student's place.
            pool: A value of `task.linear.pool`, or "auto".
        """
        if pool != "auto":
            return {"": override(run, {"task.linear.pool": pool})}
        with torch.device("meta"):
            model = make_student(run.student, image_size=run.data.image_size)
        if not model.num_prefix_tokens:
            return {"": run}
        return {
            words: override(run, {"task.linear.pool": name})
            for name, words in (
                ("mean", "mean of patches"),
                ("cls", "class token"),
                ("both", "class token and mean"),
            )
        }

    def recipe_for(self, architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
        """Returns "linear_probe", the recipe of all linear probes."""
        return "linear_probe"
