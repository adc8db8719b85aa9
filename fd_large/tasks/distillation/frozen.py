"""A word of the user's becomes a frozen model to measure: a run's student or teacher, or weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fd_large import distributed
from fd_large.backbones.hierarchical import HierarchicalBackbone
from fd_large.backbones.statistics import Statistics
from fd_large.checkpoint import store, stream
from fd_large.checkpoint.student import serve_runs
from fd_large.engine.zero import partition
from fd_large.engine.zero.live_weights import load_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import ARCHITECTURES, Architecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Data, Student, Teacher
from fd_large.tasks.distillation.build import teacher_maker, teacher_weights
from fd_large.weights.settle import settle

RANDOM = "random"
_TIMM, _TEACHER, _SCRATCH = "timm:", "#teacher", "#scratch"


@dataclass(frozen=True)
class Named:
    """A model as a recipe's section describes it, settled; nothing is built.

    Attributes:
        label: A short name, for tables and images.
        source: As the user wrote it.
        section: Model and weights.
        image_size: Side of the images that it was trained with, in pixels.
        trained_by: Recipe of the run whose student it is; None: of no run.
        seed: Of the run that it belongs to; decides random weights.
    """

    label: str
    source: str
    section: Teacher
    image_size: int
    trained_by: Run | None = None
    seed: int = 0

    def build(self) -> tuple[nn.Module, Statistics]:
        """The model with its weights, in float32 on this process's device, and its statistics."""
        run = _run(self.section, self.image_size)
        weights = teacher_weights(run)
        # A random model is the teacher that a run of this seed has.
        teacher = partition.build(teacher_maker(run), {}, partitioned=False, seed=self.seed + 1)
        if weights is not None:
            load_weights(teacher.net, weights, where=self.source)
        if self.trained_by and isinstance(teacher.net, HierarchicalBackbone):
            # Not of the weights: how it was trained to see sizes that do not divide.
            teacher.net.size_rule = self.trained_by.student.size_rule
        return teacher.to(distributed.device()).net, teacher.statistics


def find_model(source: str, *, image_size: int = 0) -> Named:
    """Finds out which model a word means; reads headers only.

    Args:
        source: The folder of a run or of one of its checkpoints (its student, the average of its
            weights where the run keeps one), RUN#teacher, RUN#scratch (its student with
            random weights); weights as `teacher.source` takes them; or NET=SOURCE, for
            weights that do not tell their model, with NET a name of the table of models or timm:NAME,
            and SOURCE weights or `random`.
        image_size: Of its images, in pixels; 0: as it was trained. A ViT's positions are resized.

    Raises: FDError: if it cannot be had.
    """
    try:
        return _found(source, image_size)
    except WeightsError as error:
        raise WeightsError(str(error).replace("--teacher.source", "model")) from None


def _found(source: str, image_size: int) -> Named:
    serve_runs()
    folder, part = source, ""
    for ending in (_TEACHER, _SCRATCH):
        if source.endswith(ending):
            folder, part = source.removesuffix(ending), ending
    path = Path(folder)
    recipe = _recipe_of(path)
    if recipe is None:
        return _of_weights(source, image_size)
    label = path.resolve().name
    if label.startswith("step_"):
        label = f"{path.resolve().parents[1].name} {label}"
    size, seed = image_size or recipe.data.image_size, recipe.runtime.seed
    if part == _TEACHER:
        if not recipe.has_teacher:
            raise ConfigError(
                f"{source}: this run has no teacher; got one of the task {recipe.task.name}, "
                "expected a distillation. Name the run alone."
            )
        section = _settled(recipe.teacher, size)
        if not image_size:
            size = _seen_size(replace(recipe, teacher=section))
        return Named(f"{label}: teacher", source, section, size, seed=seed)
    if part == _SCRATCH:
        section = Teacher(
            model=recipe.student.model,
            architecture=_sized(recipe.student_architecture(), recipe.student.architecture, size),
            source=RANDOM,
        )
        return Named(f"{label}: from scratch", source, section, size, recipe, seed)
    architecture = Architecture()
    if image_size:
        architecture = _sized(recipe.student_architecture(), architecture, size)
    section = _settled(Teacher(source=source, architecture=architecture), size)
    if not image_size:
        size = _seen_size(_run(section, size))
    return Named(label, source, section, size, recipe, seed)


def _recipe_of(path: Path) -> Run | None:
    """Of a run, or of a checkpoint by its own path; None: neither."""
    if store.manifest_of(path) is None and not store.checkpoints_of(path).is_dir():
        return None
    return Run.from_dict(stream.newest(path, where=str(path)).manifest["recipe"])


def _of_weights(source: str, image_size: int) -> Named:
    named, weights = _split(source)
    teacher = Teacher(source=weights)
    if named.startswith(_TIMM):
        teacher = replace(teacher, model="timm", architecture=_timm(named.removeprefix(_TIMM)))
    elif named:
        teacher = replace(teacher, model=named)
    settled = _settled(teacher, image_size)
    size = image_size or _own_size(settled)
    architecture = _run(settled, size).teacher_architecture()
    if image_size and architecture.family == "vit":
        wanted = replace(teacher.architecture, image_size=image_size)
        settled = _settled(replace(teacher, architecture=wanted), image_size)
    return Named(_label(named, weights), source, settled, size)


def _split(source: str) -> tuple[str, str]:
    """NET=SOURCE; a path may have the sign in it."""
    named, sign, weights = source.partition("=")
    if sign and (named in ARCHITECTURES or named.startswith(_TIMM)):
        return named, weights
    return "", source


def _timm(name: str) -> Architecture:
    from fd_large.weights.timm_backbone import strides

    return Architecture(timm_name=name, feature_stride=max(strides(name)))


def _label(named: str, weights: str) -> str:
    if named:
        return f"{named.removeprefix(_TIMM)}{', random' if weights == RANDOM else ''}"
    kind, sign, rest = weights.partition(":")
    return rest if sign else Path(kind).name


def _own_size(section: Teacher) -> int:
    """The side that a model was made for; the recipes' where it tells none."""
    architecture = _run(section, Data().image_size).teacher_architecture()
    if architecture.family == "timm":
        import timm  # A second that other models are spared.

        return timm.get_pretrained_cfg(architecture.timm_name).input_size[-1]
    return architecture.image_size or Data().image_size


def _seen_size(run: Run) -> int:
    """The side that a recipe's teacher gets: not the student's where its positions are for one."""
    with torch.device("meta"):
        teacher = teacher_maker(run)()
    return teacher.image_size or run.data.image_size


def _sized(whole: Architecture, overrides: Architecture, image_size: int) -> Architecture:
    """With positions for that size where the model has any."""
    return replace(overrides, image_size=image_size) if whole.family == "vit" else overrides


def _settled(section: Teacher, image_size: int) -> Teacher:
    return settle(_run(section, image_size or Data().image_size)).teacher


def _run(section: Teacher, image_size: int) -> Run:
    """A recipe of nothing but that model, for the functions that take recipes."""
    return Run(
        name="net",
        student=Student(model="swinv2_tiny"),
        teacher=section,
        data=Data(image_size=image_size),
    )
