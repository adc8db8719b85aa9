"""The job of distillation, which trains a student on a frozen teacher's maps, without labels.

Features beyond the paper are in the folders `several/`, `cached/` and `masked/`. The first part of
this file chooses the features of a recipe; no other file in this folder imports from these folders.
"""

from __future__ import annotations

import logging
import math
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.labelled import (
    LabelledImages,
    has_parts,
    open_held_out,
    open_split,
    open_training,
)
from fd_large.data.loader import Batch, ViewBatches
from fd_large.data.roots import BUILTIN
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.engine.job import FrozenPart, TensorSizes, TrainingJob, sizes_of
from fd_large.engine.student import make_student
from fd_large.engine.zero.engine import Engine
from fd_large.errors import check_all
from fd_large.recipes.run import ONLY, Run
from fd_large.recipes.task_kind import OF_FEW_LABELS
from fd_large.runtime.hooks import Hook
from fd_large.tasks.distillation import losses
from fd_large.tasks.distillation.cached.caches import RunCaches
from fd_large.tasks.distillation.cached.read import CachedTeacher, FromStored
from fd_large.tasks.distillation.cached.read import settled as settled_by_cache
from fd_large.tasks.distillation.cached.recorder import Recorder
from fd_large.tasks.distillation.canary import canaries
from fd_large.tasks.distillation.feature_panel import FeaturePanel
from fd_large.tasks.distillation.grids import TeacherOnShapes, check_fit
from fd_large.tasks.distillation.heads.map_head import HeardBlocks
from fd_large.tasks.distillation.held_out import Crops, held_out_losses
from fd_large.tasks.distillation.knn_accuracy import knn_accuracy
from fd_large.tasks.distillation.masked.checks import mask_checks
from fd_large.tasks.distillation.masked.sight import Masked
from fd_large.tasks.distillation.objective import (
    Known,
    check_statistics,
    facts_by_teacher,
    facts_of,
    fields_not_read,
    make_targets,
    require_same_teachers,
    target_checks,
    target_facts,
)
from fd_large.tasks.distillation.section import (
    FIXED,
    Mask,
    NamedTeacher,
    Weighting,
    evaluated_words,
    labels_of,
    source_flag,
)
from fd_large.tasks.distillation.several.mosaic import (
    AloneInEvaluation,
    Mosaic,
    check_mosaics_full,
)
from fd_large.tasks.distillation.several.running_statistics import (
    RunningStatistics,
    StepStatistics,
)
from fd_large.tasks.distillation.several.similarity import QueueDivergence, Relation
from fd_large.tasks.distillation.several.weighting import Weighted, teaches, with_datasets
from fd_large.tasks.distillation.target import NamedTarget
from fd_large.tasks.distillation.task import Distillation, Sum, Teachers, Whole
from fd_large.tasks.distillation.teacher import Beside as BesideStudent
from fd_large.tasks.distillation.teacher import (
    PlacedTeacher,
    built_teacher,
    check_stream,
    with_embedding,
)
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import settle_model

log = logging.getLogger(__name__)

AnyTeacher = Frozen | PlacedTeacher | CachedTeacher | Recorder
"""A teacher as a Module, a placed teacher, or a cache or recorder that replaces the teacher."""

# --- the choice among several/, cached/ and masked/ ---

SIMILARITIES: dict[str, Any] = {
    "relation": Relation,
    "queue": QueueDivergence,
}
"""The losses on similarities by name."""
RUNNING: dict[str, type[RunningStatistics]] = {
    "running": RunningStatistics,
    "batch": StepStatistics,
}
"""The normalisers whose statistics training updates, by name."""
KNOWN = Known(ChainMap(losses.LOSSES, SIMILARITIES), RUNNING)
"""The tables of all built-in losses and normalisers."""


def tiled(frozen: Frozen, entry: NamedTeacher, image_size: int) -> Frozen:
    """Returns the teacher, in a `Mosaic` if the teacher's entry asks for mosaics.

    Args:
        frozen: The teacher.
        entry: The teacher's entry in the recipe.
        image_size: Side of the student's images, in pixels.
    """
    if not entry.mosaic:
        return frozen
    side = frozen.side(image_size)
    return Mosaic(frozen.net, frozen.statistics, image_size=side, tiles=entry.mosaic)


def sight_of(mask: Mask, student: nn.Module, image_size: int) -> Whole:
    """Returns the object that runs the student (`sight` of `Distillation`).

    The result is a `Masked` if the mask hides patches, else a `Whole`.

    Args:
        mask: The recipe's section `mask`.
        student: The student.
        image_size: Side of the images, in pixels.
    """
    return Masked(mask, student, image_size=image_size) if mask.hides else Whole()


def composed(
    student: nn.Module,
    teachers: Mapping[str, Any],
    targets: Sequence[NamedTarget],
    *,
    weighting: Weighting = FIXED,
    taught: Sequence[Sequence[bool]] = (),
    mosaics: Collection[str] = (),
    teachers_beside: bool = False,
    sight: Any = None,
    statistics: Statistics = IMAGENET,
) -> Distillation:
    """Returns the task, composed of the paper's method and the further features of a recipe.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: Functions from uint8 images to a map, or cached teachers, by name.
        targets: What the student learns: for each target a teacher's map or summary, a head and a
            loss.
        weighting: The rule that chooses each image's teachers.
        taught: Whether each teacher teaches each dataset; the result of `teaches`.
        mosaics: Names of the teachers that run on mosaics of images.
        teachers_beside: Whether the teachers run on a separate CUDA stream.
        sight: The object that runs the student, from `sight_of`; None to show whole images.
        statistics: Mean and deviation that normalise the student's pixels.
    """
    shown: Any = Teachers(teachers)
    for is_asked, around in (
        (mosaics, partial(AloneInEvaluation, names=mosaics)),
        (any(hasattr(teacher, "of_stored") for teacher in teachers.values()), FromStored),
        (teachers_beside, BesideStudent),
    ):
        shown = around(shown) if is_asked else shown
    sight = sight or Whole()
    return Distillation(
        student,
        shown,
        targets,
        sight=HeardBlocks(sight) if any(target.reads_blocks for target in targets) else sight,
        join=Sum() if weighting.rule == "fixed" else Weighted(weighting, targets, taught),
        statistics=statistics,
    )


# ------------------------------------------------------------------------------------------------


class DistillationJob(TrainingJob):
    """The job in which a student learns frozen teachers' feature maps.

    Attributes:
        teachers: The teachers by name, after `build`; a single teacher is named "".
    """

    memory_remedy = "--teacher.placement sharded"
    teachers: Mapping[str, PlacedTeacher | CachedTeacher]

    @property
    def metrics(self) -> Mapping[str, str]:
        """Labels of the metrics, by the metrics' names.

        With a single teacher, the label of "loss" says which loss the recipe chooses; with several
        teachers it is "sum of the losses".
        """
        objective, label = self.run.objective, "sum of the losses"
        if not self.run.teachers:
            label = KNOWN.loss(objective.loss, beta=objective.beta).label
        return {"loss": label, **evaluated_words(self.run.teachers)}

    @property
    def learns_from_images_alone(self) -> bool:  # type: ignore[override]
        """Whether a step can be computed again from the step's images alone.

        The result is False in a run that reads or stores maps, or that chooses teachers by dataset,
        since the files of a skipped step (RUN/incidents) have neither maps nor datasets.
        """
        return self.run.weighting.rule != "own_data" and not (self.caches or self.caches.stores)

    @property
    def lower_is_better(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the metrics for which lower is better, the loss and each target's loss."""
        return ("loss", *(f"{label}_loss" for label in labels_of(self.run.teachers)))

    @property
    def placed(self) -> Mapping[str, PlacedTeacher]:
        """The teachers whose maps are not read from caches, by name, after `build`."""
        return {n: model for n, model in self.teachers.items() if isinstance(model, PlacedTeacher)}

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields that have no effect with the recipe's losses, normalisers, weighting and mask."""
        ignored, rule = [], self.run.weighting.rule
        if rule != "drop":
            ignored.append("weighting.drop_probability")
        if rule != "own_data":
            ignored += [f"teachers.{name}.datasets" for name in self.run.teachers]
        for name, entry in self.run.taught_by.items():
            ignored += fields_not_read(name, entry, KNOWN)
        return (*ignored, *OF_FEW_LABELS, *self.run.mask.ignored_fields())

    @property
    def remedies(self) -> Mapping[str, str]:  # type: ignore[override]
        """For each field of the mask that has no effect, a sentence that says which flags to set.

        The result is {name of the field: sentence}.
        """
        return self.run.mask.ignored_fields()

    @cached_property
    def caches(self) -> RunCaches:
        """The caches of teachers' maps that the run reads or writes."""
        run = self.run
        section, size = run.task.distillation, run.batch.micro_batch_size
        return RunCaches(run.taught_by, section, self.view_settings(), size)

    # --- before anything heavy ---

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from the weights of teachers and student.

        If the recipe states no number of views and reads caches, the number and the seed of the
        views are those of the first cache.

        Args:
            sources: Opens the weights.
        """
        settle = super().settle
        entries = self.run.taught_by
        settled, *models = check_all(
            lambda: settle(sources),
            *(
                partial(settled_by_cache, entry, where=source_flag(name))
                if name in self.caches
                else partial(settle_model, entry, sources, where=source_flag(name))
                for name, entry in entries.items()
            ),
        )
        named = {
            name: with_embedding(name, entry, sources)
            for name, entry in zip(entries, models, strict=True)
        }
        run = self._with_grids(settled.with_taught_by(named))
        section = self.caches.with_views(run.task.distillation)
        return replace(run, task=replace(run.task, distillation=section))

    @cached_property
    def settled(self) -> Run:
        """The recipe, in which "auto" image sizes and interpolations of teachers are chosen."""
        return self._with_grids(self.run)

    def _with_grids(self, run: Run) -> Run:
        """Returns a recipe, in which "auto" image sizes and interpolations of teachers are set.

        A teacher's position embeddings may be resized to the side of the teacher's images, unless
        the recipe of this job sets the size of the embeddings (architecture.image_size).

        Args:
            run: The recipe, with the models and architectures that the weights decide.
        """
        entries = {
            name: teacher.settled(follows=self.run.taught_by[name].architecture.image_size is None)
            for name, teacher in teachers_on_shapes(run).items()
        }
        return run if entries == run.taught_by else run.with_taught_by(entries)

    @cached_property
    def _on_shapes(self) -> Mapping[str, TeacherOnShapes]:
        """What finds each teacher's image side and grid, by the teacher's name.

        The entries of the teachers are those of the recipe `settled`.
        """
        return teachers_on_shapes(self.settled)

    def check(self) -> None:
        """Checks the recipe before a run, and raises an FDError if a setting cannot work.

        This method opens held-out and labelled images, opens all weights, and tries losses and
        normalisers on a few random tokens.
        """
        run, entries = self.run, self.run.taught_by.items()
        beside = run.task.distillation.teacher_stream
        stored = bool(self.caches or self.caches.stores)
        placements = {entry.placement for _, entry in entries}
        check_all(
            *(
                check
                for name, entry in entries
                for kind in entry.targets
                for check in target_checks(name, entry, kind, KNOWN)
            ),
            partial(teaches, run.weighting, run.teachers, run.data),
            *mask_checks(
                run.mask,
                self._student_on_shapes,
                run.taught_by,
                KNOWN.loss_of,
                image_size=run.data.image_size,
                image_sizes=run.data.image_sizes,
                rule=run.weighting.rule,
            ),
            lambda: run.eval.root and self._held_out_images,
            lambda: run.eval.knn_root and self._labelled_images,
            *(
                partial(frozen_weights, entry, self.weights, where=source_flag(name))
                for name, entry in entries
                if name not in self.caches
            ),
            *([partial(check_stream, placements, stored_maps=stored)] if beside else []),
            lambda: check_mosaics_full(self.images_together(), run.batch.micro_batch_size),
            *self.caches.checks(run.data, lambda name: self._on_shapes[name].gives_summary),
            super().check,
        )

    def images_together(self) -> int:
        """Returns the smallest number of images that fills the mosaics of every teacher.

        The result is 1 if no teacher runs on mosaics.
        """
        return math.lcm(*(max(1, entry.mosaic) ** 2 for entry in self.run.taught_by.values()))

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of the teachers' and the student's weights, by the recipe's field."""
        entries = self.run.taught_by.items()
        teacher_sources = {
            source_flag(name).removeprefix("--"): entry.source
            for name, entry in entries
            if name not in self.caches
        }
        return {**teacher_sources, **super().sources()}

    def open_samples(self) -> ImageSource:
        """Opens the training images, and checks that caches hold the maps of the images' views.

        The images are those of the folder `data.root`. If the folder has train/ and also val/ or
        test/, only train/ is used, since users often name the folder of a whole dataset.
        """
        data = self.run.data
        samples = open_training(data.root, val_fraction=data.val_fraction)
        if self.caches:
            if self.caches.fixed:
                self.caches.require_views(samples)
            if self.run.eval.root:
                self.caches.open_held_out(self.held_out(samples))
        return samples

    def view_batches(self, samples: ImageSource, epoch: int) -> ViewBatches:
        """Returns the loader of an epoch's views, and of the views' stored maps if there are any.

        Args:
            samples: The training images.
            epoch: Number of the epoch, counted from 0.
        """
        usual, fixed, data = super().view_batches(samples, epoch), self.caches.fixed, self.run.data
        if fixed is None:
            return usual
        beside = self.caches.beside(
            epoch,
            samples,
            workers=data.workers,
            max_bad_fraction=data.max_bad_fraction,
            between=self.between_batches,
        )
        return replace(usual, fixed=fixed, beside=beside)

    def held_out(self, samples: ImageSource) -> dict[str, Crops]:
        """Returns the two sets of evaluation views, by the prefix of the sets' metrics.

        "held_out" has views of held-out images. "unseen_crops" has crops of the training images
        that no epoch of training uses. If epochs repeat training views, the evaluation views depend
        on `view_seed`, else on the run's seed.

        Args:
            samples: The training images.
        """
        fixed, run = self.caches.fixed, self.run
        seed = fixed.seed if fixed else run.runtime.seed
        of = partial(Crops, views=run.eval.views, settings=self.view_settings(), seed=seed)
        return {
            "held_out": of(self._held_out_images),
            "unseen_crops": of(samples, skip_bad=True),
        }

    @cached_property
    def _held_out_images(self) -> ImageSource:
        """The images of `eval.root`, or only a part of these images.

        If `eval.root` is also `data.root` and `data.val_fraction` is not 0, the part is the images
        that this fraction holds out of training.
        """
        data, root = self.run.data, self.run.eval.root
        if root == data.root and data.val_fraction:
            return open_held_out(root, data.val_fraction, where="eval.root")
        return open_images(root, where="eval.root")

    @cached_property
    def _labelled_images(self) -> tuple[LabelledImages, LabelledImages]:
        """The training and the test images of the labelled dataset `eval.knn_root`."""
        root, where = self.run.eval.knn_root, "eval.knn_root"
        fraction = 0.0 if has_parts(root, where=where) else self.run.data.val_fraction
        train_set = open_split(root, "train", val_fraction=fraction, where=where)
        return train_set, open_split(
            root, "val", train_set.classes, val_fraction=fraction, where=where
        )

    def probe_batch(self, size: int) -> Batch:
        """Returns a batch of `size` grey images of the largest side in training.

        If the run reads a cache, the batch's targets are maps of zeros; otherwise it has no
        targets.
        """
        return replace(super().probe_batch(size), targets=self.caches.blank_maps(size))

    def tensor_sizes(self) -> TensorSizes:
        """Returns the sizes of the task's tensors and of the teachers' tensors.

        This method also checks that grids and heads fit all image sizes.

        Raises:
            ShapeError: if the maps of student and teacher cannot be aligned.
            ConfigError: if a head does not fit.
        """
        with torch.device("meta"):
            teachers = self.make_teachers()
            task = self.task_around(teachers)
        run = self.settled
        fits = partial(
            check_fit,
            *(task, teachers, run.taught_by),
            image_size=run.data.image_size,
            sizes=run.data.image_sizes,
        )
        check_all(*(partial(fits, size) for size in run.data.sides))
        whole = [teachers[name] for name in teachers.keys() - self.caches.folders.keys()]
        return TensorSizes(sizes_of(task), sizes_of(*whole))

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns each teacher's placement of weights, as {"NAME_teacher_placement": placement}.

        The key is "teacher_placement" for a single teacher. A placement is "replicated", "sharded"
        or "node".
        """
        entries = self.run.taught_by.items()
        return {f"{name}_teacher_placement".lstrip("_"): entry.placement for name, entry in entries}

    # --- the models ---

    def make_teacher(self, name: str) -> Frozen:
        """Constructs a teacher with random weights.

        Args:
            name: The teacher's name, or "" for a single teacher.
        """
        return self._on_shapes[name].make()

    def make_teachers(self) -> dict[str, Frozen]:
        """Constructs all teachers by name, with random weights."""
        return {name: self.make_teacher(name) for name in self.run.taught_by}

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the teachers with their weights, before the student's engine is built.

        Args:
            bfloat16: Whether the student's matrix products are in bfloat16, else in float32.
            node_size: Number of ranks per node.
            persistence_threshold: Number of elements up to which a tensor is not sharded.
        """
        entries = self.settled.taught_by
        placed = {
            name: built_teacher(
                name,
                entry,
                partial(self.make_teacher, name),
                self.weights,
                student_type="bfloat16" if bfloat16 else "float32",
                # One seed for all teachers: random weights do not depend on a teacher's name.
                seed=self.run.runtime.seed + 1,
                node_size=node_size,
                persistence_threshold=persistence_threshold,
            )
            for name, entry in entries.items()
            if name not in self.caches
        }
        all_teachers = {**placed, **self.caches.teachers()}
        self.teachers = {name: all_teachers[name] for name in entries}
        self.caches.record(placed)

    def take_models_of(self, other: TrainingJob) -> None:
        """Uses the teachers and caches of another job, which trains another student.

        Args:
            other: The job, whose `build` has run.
        """
        assert isinstance(other, DistillationJob)
        self.teachers, self.caches = other.teachers, other.caches

    def make_task(self) -> Distillation:
        """Constructs the task with the run's teachers, which `build` has made.

        Raises: ConfigError: if a file of statistics was measured on another target.
        """
        task = self.task_around({**self.teachers, **self.caches.recorders})
        for target in task.targets:
            entry = self.run.taught_by[target.teacher]
            check_statistics(target, entry, partial(self.target_facts, task, target))
        return task

    def target_facts(self, task: Distillation, target: NamedTarget) -> Mapping[str, Any]:
        """Returns the settings and hashes, by name, that decide the tokens of a target.

        If they are equal in two runs, the target has the same tokens for the same images.

        Args:
            task: The task with the run's teachers.
            target: One of the task's targets.
        """
        return target_facts(
            target,
            task.student,
            self.teachers[target.teacher],
            self.settled.taught_by[target.teacher],
            image_size=self.settled.data.image_size,
            teacher_image_size=self._on_shapes[target.teacher].image_size,
        )

    def models_on_shapes(self) -> tuple[Distillation, tuple[nn.Module, ...]]:
        """Constructs the task and the teachers' models, with random weights.

        Returns: the task, and the models of the teachers whose maps are not read from caches.
        """
        teachers = self.make_teachers()
        models = tuple(teachers[name] for name in teachers if name not in self.caches)
        return self.task_around(teachers | self.caches.teachers()), models

    def task_around(self, teachers: Mapping[str, AnyTeacher]) -> Distillation:
        """Constructs the task with the given teachers; student and heads have random weights.

        Args:
            teachers: The teachers by name.
        """
        run, entries, size = self.run, self.settled.taught_by, self.run.data.image_size
        several = bool(run.data.image_sizes)
        student = make_student(run.student, image_size=size, resizes_positions=several)
        sight = sight_of(run.mask, student, size)
        width = sight.width(student)
        return composed(
            student,
            teachers,
            make_targets(student, teachers, entries, image_size=size, width=width, known=KNOWN),
            weighting=run.weighting,
            taught=teaches(run.weighting, run.teachers, run.data),
            mosaics=[name for name, entry in entries.items() if entry.mosaic],
            teachers_beside=run.task.distillation.teacher_stream,
            sight=sight,
        )

    def _student_on_shapes(self) -> nn.Module:
        """Returns the student on the meta device."""
        with torch.device("meta"):
            return make_student(self.run.student, image_size=self.run.data.image_size)

    # --- training ---

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields micro-batches of views.

        If `weighting.rule` is "own_data", the targets of a micro-batch also have the number of each
        image's dataset.

        Args:
            samples: The training images.
            portion: The part of an epoch that this rank loads.
        """
        batches = super().batches(samples, portion)
        own_data = self.run.weighting.rule == "own_data"
        return with_datasets(batches, samples) if own_data else batches

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns the evaluations that the recipe asks for: held-out losses and k-NN accuracy.

        Args:
            engine: The engine of the task.
            samples: The training images.
            micro_batch_size: Number of images of a forward.
        """
        evaluations, run = [], self.run
        if run.eval.root:
            if run.eval.root.startswith(BUILTIN) and not run.data.root.startswith(BUILTIN):
                log.warning(
                    "eval.root: held-out figures and plots use the quick start's photographs, not "
                    "your images; set --eval.root FOLDER to use your own"
                )
            evaluations.append(
                held_out_losses(
                    self.held_out(samples),
                    engine,
                    every=run.eval.every,
                    micro_batch_size=micro_batch_size,
                    stored=self.caches.held_out,
                )
            )
        if run.eval.knn_root:
            evaluations.append(
                knn_accuracy(
                    engine,
                    *self._labelled_images,
                    Path(run.run_dir()) / "features",
                    every=run.eval.knn_every,
                    image_size=run.data.image_size,
                    micro_batch_size=micro_batch_size,
                    workers=run.data.workers,
                    max_pixels=run.data.max_pixels,
                    blank_maps=self.caches.blank_maps(1),
                )
            )
        return evaluations

    def hooks(self) -> Sequence[Hook]:
        """Returns the hook that writes the feature panel, and canaries that check teachers.

        There is a canary for each teacher whose maps are not read from a cache; there is none if
        `runtime.canary_every` is 0.
        """
        every = self.run.runtime.canary_every
        return [FeaturePanel(), *canaries(self.placed, every, self.run.data.image_size)]

    def evaluated(self, first: Mapping[str, float], last: Mapping[str, float]) -> Mapping[str, Any]:
        """Returns the metrics for summary.json, by name.

        Args:
            first: Metrics of the evaluation before training; only the held-out loss is used.
            last: Metrics of the newest evaluation.
        """
        newest = {name: value for name, value in last.items() if name != "held_out_best_constant"}
        named = {
            "held_out_loss_start": first.get("held_out_loss"),
            "loss_best_constant": last.get("held_out_best_constant"),
        }
        return {**super().evaluated({}, {}), **named, **newest}

    # --- checkpoints and records ---

    def summary(self) -> Mapping[str, Any]:
        """Returns the first entries of summary.json, with models and sources of the teachers."""
        if not self.run.teachers:
            return {**super().summary(), **self.caches.early()}
        teachers = {
            name: {"model": entry.model, "source": entry.source}
            for name, entry in self.run.teachers.items()
        }
        first_entries = {"recipe": self.run.name, "student": self.run.student.model}
        return {**first_entries, "teacher": None, "teachers": teachers, **self.caches.early()}

    def facts(self) -> Mapping[str, Any]:
        """Returns what a manifest records of each teacher, and the result of `RunCaches.early`.

        A teacher's record is the result of `facts_of`. With several teachers the records are by
        name under the key "teachers".
        """
        facts = {name: self._facts_of(name) for name in self.run.taught_by}
        several = {"teachers": facts} if self.run.teachers else facts[ONLY]
        return {**several, **self.caches.early()}

    def _facts_of(self, name: str) -> dict[str, Any]:
        """Returns what a checkpoint's manifest records of the teacher `name`, by `facts_of`."""
        cache = self.caches.readers.get(name)
        return facts_of(self.run.taught_by[name], self.teachers[name].fingerprint, cache)

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Checks that a checkpoint's student had the same teachers, maps and statistics.

        Args:
            manifest: Manifest of the checkpoint.

        Raises: CheckpointError: if the teachers, maps or statistics differ.
        """
        stored = facts_by_teacher(manifest, several=bool(self.run.teachers))
        require_same_teachers(self.run.taught_by, stored, self._facts_of)
        self.caches.resume(manifest)

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns model, source and image size of each teacher, by the teacher's name.

        A single teacher is named "teacher". If its maps are read from a cache, the source is that
        of the weights that computed the maps.
        """
        return {
            name or "teacher": FrozenPart(
                replace(teacher.entry, source=self.caches.source_of(name)), teacher.image_size
            )
            for name, teacher in self._on_shapes.items()
        }


def teachers_on_shapes(run: Run) -> dict[str, TeacherOnShapes]:
    """Returns what finds each teacher's image side and grid, by the teacher's name.

    Args:
        run: The recipe, with the models and architectures that the weights decide.
    """
    data = run.data
    return {
        name: TeacherOnShapes(
            name,
            entry,
            run.student,
            image_size=data.image_size,
            sizes=data.image_sizes,
            around=tiled,
        )
        for name, entry in run.taught_by.items()
    }
