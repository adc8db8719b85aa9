"""Frozen models: as a Module for uint8 images, and found by a word of the user's.

A word means a run's student, another model of a run (RUN#teacher), or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.hierarchical import HierarchicalBackbone
from fd_large.backbones.registry import build, family_of, family_of_source, is_module, statistics_of
from fd_large.backbones.resize import resize_images
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.checkpoint import store, stream
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.job import Job
from fd_large.engine.student import attention_memory
from fd_large.engine.zero import partition
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, nearest
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Data, FrozenModel
from fd_large.weights.settle import settle_model, stated_statistics
from fd_large.weights.source import Sources

RANDOM = "random"
_SCRATCH, _STUDENT = "scratch", "student"
# In messages, for words that no flag names.
_WHERE = "model"


class Frozen(nn.Module):
    """A frozen backbone that maps uint8 images to its feature map.

    Args:
        net: A backbone: normalised images -> FeatureMap after its final norm.
        statistics: The normalisation that the backbone was trained with.
        image_size: Side to which the normalised images are resized (bilinear, antialiased) before
            the backbone; 0 leaves them as they are.
    """

    def __init__(self, net: nn.Module, statistics: Statistics, *, image_size: int = 0) -> None:
        super().__init__()
        self.net = net
        self.statistics = statistics
        self.image_size = image_size
        self.requires_grad_(False)
        super().train(False)

    @property
    def width(self) -> int:
        """Channels of the map."""
        return self.net.width

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns rows and columns of the map for square images of this side."""
        side = self.image_size or image_size
        return self.net.grid(side, side)

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation whatever the parent does."""
        return super().train(False)

    def forward(self, images: Tensor) -> FeatureMap:
        """Returns the map of uint8 images (B, 3, H, W), without gradient.

        Source: official code, models/feature_distillation.py FD.forward, the target branch.
        """
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            if self.image_size and self.image_size != pixels.shape[-1]:
                pixels = resize_images(pixels, (self.image_size, self.image_size))
            # Under ZeRO-3 a parameter outside its module's forward is empty but keeps its dtype.
            return self.net(pixels.to(next(self.net.parameters()).dtype))


def frozen_maker(
    section: FrozenModel, *, image_size: int, own_image_size: int = 0
) -> Callable[[], Frozen]:
    """Returns a constructor of a settled section's model, with random weights.

    Args:
        section: Its name, architecture and statistics.
        image_size: Side of the images that it will be given, in pixels.
        own_image_size: Side to which they are resized for it; 0: as they are, or the one side that
            a table of positions allows.
    """
    architecture = resolve(section.model, section.architecture)
    # A model with a table of positions has one size; others take the images as they are.
    side = own_image_size or architecture.fixed_image_size

    def make() -> Frozen:
        net = build(
            architecture,
            initialization="official",
            attention_memory=attention_memory("auto"),
        )
        own = stated_statistics(section) or getattr(net, "statistics", None)
        statistics = own or statistics_of(section.model, architecture)
        return Frozen(net, statistics, image_size=0 if side == image_size else side)

    return make


def frozen_weights(
    section: FrozenModel, sources: Sources, *, where: str = "--teacher.source"
) -> Iterable[tuple[str, Tensor]] | None:
    """Finds the weights of a settled section's model; reads headers only.

    That the file covers the model is known when this returns.

    Args:
        section: The settled section.
        sources: Opens the weights, or has opened them.
        where: The flag of the source, for messages.

    Returns: (name, tensor) of the model; None if it is random or brings its own.
    Raises: ConfigError: if the section names no source; WeightsError: if the file does not fit.
    """
    source = section.source
    if source == "":
        raise ConfigError(
            f"{where}: {section.model} has no weights; got nothing, expected a file. Set {where} "
            f"PATH, or {where} random for a test or a throughput run."
        )
    if source == RANDOM or is_module(source):
        return None
    flags = where.removesuffix(".source")
    return sources.fitted(
        source,
        resolve(section.model, section.architecture),
        allow=section.allow,
        where=where,
        remedy=f"Set {flags}.model auto to take the model of the file, or {flags}.allow NAMES to "
        "do without.",
    )


@dataclass(frozen=True)
class Named:
    """A model as a recipe's section describes it, settled; nothing is built.

    Attributes:
        label: A short name, for tables and pictures.
        source: The user's word.
        section: Model and weights.
        image_size: Side of the images that it was trained with, in pixels.
        trained_by: Recipe of the run whose student it is; None: it is no run's student.
        seed: Seed of the run that it belongs to; decides random weights.
        weights: Has opened its weights.
    """

    label: str
    source: str
    section: FrozenModel
    image_size: int
    trained_by: Run | None = None
    seed: int = 0
    weights: Sources = field(default_factory=Sources, compare=False, repr=False)

    def build(self) -> tuple[nn.Module, Statistics]:
        """Builds the model with its weights, in float32 on this process's device.

        Returns: the backbone, and the statistics by which its images are normalised.
        """
        weights = frozen_weights(self.section, self.weights)
        make = frozen_maker(self.section, image_size=self.image_size)
        # A random model is the one that a run of this seed has.
        model = partition.build(make, {}, partitioned=False, seed=self.seed + 1)
        if weights is not None:
            load_weights(model.net, weights, where=self.source)
        if self.trained_by and isinstance(model.net, HierarchicalBackbone):
            # Not in the weights: how it was trained to see sizes that do not divide.
            model.net.size_rule = self.trained_by.student.size_rule
        return model.to(distributed.device()).net, model.statistics


def find_model(source: str, job_of: Callable[[Run], Job], *, image_size: int = 0) -> Named:
    """Finds out which model a word means; reads headers only.

    Args:
        source: The folder of a run or of one of its checkpoints (its student, the average of its
            weights where the run keeps one); RUN#NAME, a model that the run uses and does not
            train (RUN#teacher), or RUN#scratch (its student with random weights); weights as
            `teacher.source` takes them; or NET=SOURCE, for weights that do not tell their model,
            with NET a name of the table of models or timm:NAME, and SOURCE weights or `random`.
        job_of: Makes the job of a stored recipe.
        image_size: Side of its images, in pixels; 0: as it was trained. A ViT's positions are
            resized.

    Raises: FDError: if it cannot be had.
    """
    weights = sources_of(job_of)
    folder, sign, part = source.rpartition("#")
    recipe = _recipe_of(Path(folder)) if sign else None
    if recipe is None:
        folder, part = source, ""
        recipe = _recipe_of(Path(folder))
    if recipe is None or part == _STUDENT:
        return _of_weights(source, image_size, weights)
    path = Path(folder)
    label = path.resolve().name
    if label.startswith("step_"):
        label = f"{path.resolve().parents[1].name} {label}"
    size, seed = image_size or recipe.data.image_size, recipe.runtime.seed
    if part == _SCRATCH:
        section = FrozenModel(
            model=recipe.student.model,
            architecture=_sized(recipe.student_architecture(), recipe.student.architecture, size),
            source=RANDOM,
        )
        return Named(f"{label}: from scratch", source, section, size, recipe, seed, weights=weights)
    if part:
        models = job_of(recipe).frozen_models()
        if part not in models:
            raise ConfigError(
                f"{source}: this run has no {part}; got one of the task {recipe.task.name}, "
                f"{nearest(part, [*models, _SCRATCH])}. Name the run alone."
            )
        section = settle_model(models[part].section, weights, where=_WHERE)
        if not image_size:
            size = _seen_size(section, size, models[part].image_size)
        return Named(f"{label}: {part}", source, section, size, seed=seed, weights=weights)
    architecture = Architecture()
    if image_size:
        architecture = _sized(recipe.student_architecture(), architecture, size)
    section = settle_model(
        FrozenModel(source=source, architecture=architecture), weights, where=_WHERE
    )
    if not image_size:
        size = _seen_size(section, size)
    return Named(label, source, section, size, recipe, seed, weights=weights)


def _recipe_of(path: Path) -> Run | None:
    """The recipe of a run, or of a checkpoint by its own path; None: neither."""
    if store.manifest_of(path) is None and not store.checkpoints_of(path).is_dir():
        return None
    return Run.from_dict(stream.newest(path, where=str(path)).manifest["recipe"])


def _of_weights(source: str, image_size: int, weights: Sources) -> Named:
    named, file = _split(source)
    section = FrozenModel(source=file)
    if brought := family_of_source(named):
        family, rest = brought
        architecture, _ = family.scheme.settle(rest, section.architecture, _WHERE)
        section = replace(section, model=family.architecture.family, architecture=architecture)
    elif named:
        section = replace(section, model=named)
    settled = settle_model(section, weights, where=_WHERE)
    architecture = resolve(settled.model, settled.architecture)
    size = image_size or _own_size(architecture)
    if image_size and architecture.resizes_positions:
        wanted = replace(section.architecture, image_size=image_size)
        settled = settle_model(replace(section, architecture=wanted), weights, where=_WHERE)
    return Named(_label(named, file), source, settled, size, weights=weights)


def _split(source: str) -> tuple[str, str]:
    """NET=SOURCE; a path may have the sign in it."""
    named, sign, weights = source.partition("=")
    if sign and (named in ARCHITECTURES or family_of_source(named)):
        return named, weights
    return "", source


def _label(named: str, weights: str) -> str:
    if named:
        return f"{named.rpartition(':')[2]}{', random' if weights == RANDOM else ''}"
    kind, sign, rest = weights.partition(":")
    return rest if sign else Path(kind).name


def _own_size(architecture: FamilyArchitecture) -> int:
    """The side that a model was made for; the recipes' where nothing says it."""
    facts = family_of(architecture).facts_of(architecture)
    return getattr(architecture, "image_size", facts.image_size if facts else Data().image_size)


def _seen_size(section: FrozenModel, image_size: int, own_image_size: int = 0) -> int:
    """The side that a model gets: not that of the images where its positions are for one."""
    with torch.device("meta"):
        model = frozen_maker(section, image_size=image_size, own_image_size=own_image_size)()
    return model.image_size or image_size


def _sized(whole: FamilyArchitecture, overrides: Architecture, image_size: int) -> Architecture:
    """With positions for that size where the model has any."""
    return replace(overrides, image_size=image_size) if whole.resizes_positions else overrides
