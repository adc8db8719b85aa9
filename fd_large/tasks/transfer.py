"""Makes the recipes of a task's trainings that begin from a named model, and compares the runs.

`Transfer` is the third of the three classes of a task (`fd_large/recipes/task_kind.py`), used by
the commands `evaluate` and `transfer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fd_large.data.folder import ImageFolder
from fd_large.engine.job import TrainingJob
from fd_large.engine.student import OWN_FIELDS, as_student, refuse_decided
from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import FamilyArchitecture, WindowedTransformer
from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel, Student

_WINDOW = "architecture.window_size"
_OF_THE_MODEL = {"model", "init", "init_allow"}


class Divisible(NamedTuple):
    """Training images of which `data.val_fraction` can hold out a part.

    Attributes:
        root: Value of `data.root` to use together with `data.val_fraction`.
        folder: The folder of the images; the path of an image below it decides whether the image
            is held out.
        fingerprint: A hash of the images' names.
    """

    root: str
    folder: ImageFolder
    fingerprint: str


class Transfer:
    """Makes the recipes of a task's trainings that begin from models which the user names.

    The class also says which metrics of these trainings are compared.
    """

    def starting_from(
        self,
        run: Run,
        model: FrozenModel,
        *,
        image_size: int,
        trained_as: Student | None,
        fields: Collection[str],
    ) -> Run:
        """Returns a recipe whose student is the named model.

        The attention window stays that of `run`, unless the position tables of the named model fix
        the window. The student's fields for images of other sizes (such as `size_rule`) stay those
        of `run` if the family of the named model uses them, or if the user set them. Otherwise they
        become the defaults. If each block of `run`'s
        student has its own position bias, each block of the new student has one too.

        Args:
            run: The recipe.
            model: The named model and the source of its weights. Fields that the weights decide
                must be filled in (`settle_model`).
            image_size: Side of the model's images, in pixels.
            trained_as: The student's section in the run that trained the model; None if no run
                trained it.
            fields: Fields of the student that the user set in the recipe.

        Raises: ConfigError: if `fields` has a field that the named model decides.
        """
        base, recipe_architecture = run.student, run.student_architecture()
        decided = [f for f in fields if f in _OF_THE_MODEL or f.startswith("architecture.")]
        refuse_decided(decided, (*OWN_FIELDS, "size_rule", _WINDOW))
        architecture = resolve(model.model, model.architecture)
        if recipe_architecture == recipe_architecture.with_own_position_biases():
            architecture = architecture.with_own_position_biases()
        window = base.architecture.window_size
        # The position tables of a Swin of the first version fix its window.
        takes_window = architecture.has_stage_windows or _WINDOW in fields
        if window and takes_window and isinstance(architecture, WindowedTransformer):
            architecture = architecture.with_window(window)
        base = base.without_rules_unknown_to(architecture, unchanged=fields)
        return replace(run, student=as_student(model, architecture, base, trained_as=trained_as))

    def recipe_for(self, architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
        """Returns the name of the recipe that trains a model if the user names no recipe.

        Args:
            architecture: Architecture of the model.
            run_recipe: Name of the recipe of the run that trained the model; "" if the model has
                random weights, which no run trained; None if the weights come from elsewhere.
        """
        raise NotImplementedError

    def variants(self, run: Run, pool: str) -> Mapping[str, Run]:
        """Returns {label: recipe} of the trainings of a model whose results are compared.

        Args:
            run: The recipe, with the model in the student's place.
            pool: The pooled feature to probe; "auto" for all pooled features that the model has.

        Returns: by default the given recipe alone, with the label "".
        """
        return {"": run}

    def divisible(self, job: TrainingJob) -> Divisible:
        """Opens the training images of a recipe, of which `data.val_fraction` can hold out a part.

        Args:
            job: A job whose recipe names the images.

        Raises: DataError: if the images cannot be divided by the names of their files.
        """
        images: Any = job.open_samples()
        return Divisible(job.run.data.root, ImageFolder(images.folder), images.fingerprint)

    def compared(self, summary: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Returns the metrics of a finished run that the command `evaluate` compares.

        Args:
            summary: Content of the run's summary.json.

        Returns: the accuracy in per cent, and a dictionary of further metrics by name.
        """
        raise NotImplementedError
