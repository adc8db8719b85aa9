"""Finds the model that a user names: a run's student, a run's frozen model, or weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from fd_large.backbones.registry import family_of_source, own_image_size
from fd_large.backbones.statistics import Statistics
from fd_large.checkpoint import store, stream
from fd_large.checkpoint.read import Reader
from fd_large.engine.checkpoint_models import sources_of, warn_of_changed_code
from fd_large.engine.frozen import frozen_maker, frozen_weights
from fd_large.engine.job import JobOf, TrainingJob
from fd_large.engine.zero import partition
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, nearest
from fd_large.files import kind_of
from fd_large.ranks import distributed
from fd_large.recipes.architectures import Architecture, resolve, split_model
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.sections import RANDOM, Data, FrozenModel
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import settle_model

_STUDENT, _SCRATCH = "student", "scratch"


def _where(source: str) -> str:
    """Returns "model SOURCE", for messages about a model that the user named without a flag."""
    return f"model {source}"


@dataclass(frozen=True)
class NamedModel:
    """A model that a user named, found but not built.

    Attributes:
        label: A short name, for tables and plots.
        source: The words by which the user named the model (see `find_model`).
        section: A recipe's section with the model and its weights; the fields that the weights
            decide are set.
        image_size: Side of the model's images, in pixels.
        trained_by: Job of the run whose student this model is, or None for other models.
        seed: Seed of the model's run, which decides random weights.
        weights: The `Sources` by which the model's weights were found.
        checkpoint: Folder of the checkpoint from which a run's trained student is read; None for
            other models. So recipe and weights come from the same checkpoint, even if the run still
            trains and writes a newer one.
    """

    label: str
    source: str
    section: FrozenModel
    image_size: int
    trained_by: TrainingJob | None = None
    seed: int = 0
    weights: Sources = field(default_factory=Sources, compare=False, repr=False)
    checkpoint: Path | None = None

    @property
    def architecture(self) -> FamilyArchitecture:
        """The model's architecture, with every field set."""
        return resolve(self.section.model, self.section.architecture)

    @property
    def folder(self) -> Path | None:
        """The folder of the checkpoint or of the weights file; None if there is neither."""
        if self.checkpoint or self.section.source == RANDOM:
            return self.checkpoint
        return self.weights.resolve(self.section.source).folder

    def build(self) -> tuple[nn.Module, Statistics]:
        """Builds the model with its weights, in float32 on this process's device.

        Returns the backbone, and the statistics with which its images are normalised.
        """
        weights = frozen_weights(self.section, self.weights, where=_where(self.source))
        # The weights do not show how the model treats image sizes that its windows do not divide.
        sizes = self.trained_by.run.student.sizes() if self.trained_by else {}
        make = frozen_maker(self.section, image_size=self.image_size, **sizes)
        # The same random model as in a run of this seed.
        model = partition.build(make, {}, partitioned=False, seed=self.seed + 1)
        if weights is not None:
            load_weights(model.net, weights, where=self.source)
        return model.to(distributed.device()).net, model.statistics


def find_model(source: str, job_of: JobOf, *, image_size: int = 0) -> NamedModel:
    """Finds the model that a user names; reads only headers of weight files.

    Args:
        source: The folder of a run or of a checkpoint, for the run's student (with the average of
            its weights if there is an average); RUN#NAME, for a model that the run uses and does
            not train (RUN#teacher); RUN#scratch, for the run's student with random weights;
            weights, as `teacher.source` takes them; or MODEL=SOURCE, for weights that do not show
            their model. MODEL is a name in the table of models or timm:NAME, SOURCE is weights or
            `random`.
        job_of: Makes the job of a stored recipe.
        image_size: Side of the model's images, in pixels, to which tables of positions are resized.
            0 stands for the side with which the model was trained.

    Raises: FDError: if there is no such model.
    """
    # Nothing here has a flag for image statistics, and those of a run were settled before.
    weights = sources_of(job_of, guesses=True)
    folder, sign, part = source.rpartition("#")
    checkpoint = _checkpoint_of(Path(folder)) if sign else None
    if checkpoint is None:
        folder, part = source, ""
        checkpoint = _checkpoint_of(Path(folder))
    if checkpoint is None or part == _STUDENT:
        return _of_weights(source, image_size, weights)
    job, path = job_of(checkpoint.manifest["recipe"]), Path(folder)
    label = path.resolve().name
    if label.startswith("step_"):
        label = f"{path.resolve().parents[1].name} {label}"
    run, whole = job.run, job.run.student_architecture()
    size, seed = image_size or run.data.image_size, run.runtime.seed
    if part == _SCRATCH:
        section = FrozenModel(
            model=run.student.model,
            architecture=_sized(whole, run.student.architecture, size),
            source=RANDOM,
        )
        return NamedModel(
            f"{label}: from scratch", source, section, size, job, seed, weights=weights
        )
    if part:
        models = job.frozen_models()
        if part not in models:
            raise ConfigError(
                f"{source}: a run of {run.task.name} has no such part; got {part!r}, "
                f"{nearest(part, [*models, _SCRATCH])}. Name one of these parts, or only the run."
            )
        stored = models[part].section
        weights.settled[stored.source] = stored.statistics
        section = settle_model(stored, weights, where=_where(source))
        warn_of_changed_code(checkpoint, resolve(section.model, section.architecture))
        if not image_size:
            size = _seen_size(section, size, models[part].image_size)
        return NamedModel(f"{label}: {part}", source, section, size, seed=seed, weights=weights)
    section = FrozenModel(source=str(checkpoint.path))
    if image_size:
        section = replace(section, architecture=_sized(whole, section.architecture, size))
    section = settle_model(section, weights, where=_where(source))
    if not image_size:
        size = _seen_size(section, size)
    return NamedModel(label, source, section, size, job, seed, weights, checkpoint.path)


def find_models(sources: Sequence[str], job_of: JobOf, *, image_size: int = 0) -> list[NamedModel]:
    """Finds several models; their labels are distinct, also as folder names (`slug`).

    For the arguments see `find_model`.

    Raises: FDError: if a model is not found, or if two sources are the same.
    """
    return with_own_labels(
        [find_model(source, job_of, image_size=image_size) for source in sources]
    )


def with_own_labels(models: Sequence[NamedModel]) -> list[NamedModel]:
    """Returns the models with labels that are distinct, also as folder names (`slug`).

    If the models' own labels are not distinct, all labels are replaced by the models' sources.

    Raises: ConfigError: if two models have the same source.
    """
    for candidates in (models, [replace(model, label=model.source) for model in models]):
        if len({slug(model.label) for model in candidates}) == len(candidates):
            return list(candidates)
    raise ConfigError(
        f"MODEL: the same model twice; got {', '.join(model.source for model in models)}, "
        "expected different models. Leave one of them out."
    )


def slug(label: str) -> str:
    """Returns `label` as a folder's name: letters, digits, ".", "-" and "_" are kept.

    Other characters become "_", which is removed at the ends. If nothing or only dots would be
    left, the result is "model".
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", label).strip("_")
    return name if name.strip(".") else "model"  # Dots alone lead out of the folder.


def _checkpoint_of(path: Path) -> Reader | None:
    """Opens the checkpoint at `path`, or the newest of the run at `path`; None if it is neither."""
    if store.manifest_of(path) is None and kind_of(store.checkpoints_of(path)) != "folder":
        return None
    return stream.newest(path, where=str(path))


def _of_weights(source: str, image_size: int, weights: Sources) -> NamedModel:
    named, file = split_model(source)
    section = FrozenModel(source=file)
    if brought := family_of_source(named):
        family, rest = brought
        architecture, _ = family.scheme.settle(rest, section.architecture, _where(source))
        section = replace(section, model=family.architecture.family, architecture=architecture)
    elif named:
        section = replace(section, model=named)
    settled = settle_model(section, weights, where=_where(source))
    architecture = resolve(settled.model, settled.architecture)
    size = image_size or own_image_size(settled.model, architecture) or Data().image_size
    if image_size and architecture.resizes_positions:
        resized = replace(section.architecture, image_size=image_size)
        settled = settle_model(
            replace(section, architecture=resized), weights, where=_where(source)
        )
    return NamedModel(_label(named, file), source, settled, size, weights=weights)


def _label(named: str, weights: str) -> str:
    if named:
        return f"{named.rpartition(':')[2]}{', random' if weights == RANDOM else ''}"
    kind, sign, rest = weights.partition(":")
    return rest if sign else Path(kind).name


def _seen_size(section: FrozenModel, image_size: int, own_image_size: int = 0) -> int:
    """Returns the side of the images that a model's backbone gets, in pixels.

    `image_size` is the side of the images that the model is given. `frozen_maker` may resize them,
    also to `own_image_size`.
    """
    with torch.device("meta"):
        model = frozen_maker(section, image_size=image_size, own_image_size=own_image_size)()
    return model.image_size or image_size


def _sized(whole: FamilyArchitecture, overrides: Architecture, image_size: int) -> Architecture:
    """Returns `overrides` with the side `image_size` in pixels, if the model can be resized.

    `whole` is the model's architecture, which says whether its position tables can be resized.
    """
    return replace(overrides, image_size=image_size) if whole.resizes_positions else overrides
