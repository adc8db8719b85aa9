"""The job of distillation: images without labels, a frozen teacher, held-out losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.balanced import Balanced
from fd_large.data.labelled import LabelledImages, has_parts, open_split, open_training
from fd_large.data.loader import Batch, Beside, ViewBatches
from fd_large.data.photographs import PREFIX as BUILTIN
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.data.views import FixedViews
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.engine.job import FrozenPart, TensorSizes, TrainingJob, sizes_of
from fd_large.engine.student import make_student
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError, check_all
from fd_large.ranks import distributed
from fd_large.recipes.run import ONLY, Run
from fd_large.runtime.hooks import Hook
from fd_large.tasks.distillation import target_statistics
from fd_large.tasks.distillation.cached.caches import RunCaches
from fd_large.tasks.distillation.cached.read import CachedTeacher, FromStored, StoredMaps
from fd_large.tasks.distillation.cached.read import settled as settled_by_cache
from fd_large.tasks.distillation.cached.recorder import Recorder, Recorders
from fd_large.tasks.distillation.cached.views import (
    ViewsToStore,
    check_fixed_views,
    check_stored_summary,
    training_view,
    view_facts,
)
from fd_large.tasks.distillation.cached.views import batch_size as cached_batch_size
from fd_large.tasks.distillation.canary import Canary, seconds_of_product
from fd_large.tasks.distillation.feature_panel import FeaturePanel
from fd_large.tasks.distillation.grids import check_fit, sides_of, teacher_maker, with_grid
from fd_large.tasks.distillation.heads.map_head import HeardBlocks
from fd_large.tasks.distillation.held_out import Crops, HeldOutViews, held_out_losses
from fd_large.tasks.distillation.knn_accuracy import knn_accuracy
from fd_large.tasks.distillation.objective import (
    facts_by_teacher,
    facts_of,
    fields_not_read,
    make_loss,
    make_targets,
    require_same_teachers,
    statistics_file,
    target_checks,
    target_facts,
)
from fd_large.tasks.distillation.section import (
    FIXED,
    SUMMARY,
    Weighting,
    check_storable,
    evaluated_words,
    labels_of,
    naming_target,
    source_flag,
)
from fd_large.tasks.distillation.several.mosaic import AloneInEvaluation, check_mosaics_full
from fd_large.tasks.distillation.several.weighting import DATASETS, Weighted, teaches
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
"""A teacher on shapes alone, one that is built, and what stands in the place of one."""

EARLY = "epochs_from_stored_maps"
"""Name, in manifests and summary.json, of the epochs of `Recorders.early`."""


def composed(
    student: nn.Module,
    teachers: Mapping[str, Any],
    targets: Sequence[NamedTarget],
    *,
    weighting: Weighting = FIXED,
    teaches: Sequence[Sequence[bool]] = (),
    mosaics: Collection[str] = (),
    teachers_beside: bool = False,
    sight: Any = None,
    statistics: Statistics = IMAGENET,
) -> Distillation:
    """Returns the paper's task with the seams that a recipe fills otherwise.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: What gives a map of uint8 images, or stands in the place of a teacher, by name.
        targets: What is learnt of them.
        weighting: Which of several teachers each image learns from.
        teaches: As `Weighted`.
        mosaics: Names of the teachers that see several images at once.
        teachers_beside: Whether the teachers compute on a CUDA stream of their own.
        sight: What the student sees; None: whole images.
        statistics: The student's normalisation.
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
        join=Sum() if weighting.rule == "fixed" else Weighted(weighting, targets, teaches),
        statistics=statistics,
    )


class DistillationJob(TrainingJob):
    """The student learns the teacher's feature map."""

    memory_remedy = "--teacher.placement sharded"
    _teachers: Mapping[str, PlacedTeacher | CachedTeacher] | None = None
    _recorders: Recorders | None = None

    @property
    def metrics(self) -> Mapping[str, str]:
        """The words for this task's numbers; the loss brings its own."""
        objective, label = self.run.objective, "sum of the losses"
        if not self.run.teachers:
            label = make_loss(objective.loss, beta=objective.beta).label
        return {"loss": label, **evaluated_words(self.run.teachers)}

    @property
    def learns_from_images_alone(self) -> bool:  # type: ignore[override]
        """Not where its dataset or a stored map is needed too: an incident does not hold it."""
        stored = self._caches or self.run.task.distillation.cache
        return self.run.weighting.rule != "own_data" and not stored

    @property
    def lower_is_better(self) -> tuple[str, ...]:  # type: ignore[override]
        """The loss, and that of each target."""
        return ("loss", *(f"{one}_loss" for one in labels_of(self.run.teachers)))

    @property
    def teachers(self) -> Mapping[str, PlacedTeacher | CachedTeacher]:
        """The frozen teachers by name, "" for an only one; only after `build`."""
        assert self._teachers is not None
        return self._teachers

    @property
    def placed(self) -> Mapping[str, PlacedTeacher]:
        """Those that are models; only after `build`."""
        return {n: one for n, one in self.teachers.items() if isinstance(one, PlacedTeacher)}

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields that this recipe's losses or normalisers do not read."""
        ignored, rule = [], self.run.weighting.rule
        if rule != "drop":
            ignored.append("weighting.drop_probability")
        if rule != "own_data":
            ignored += [f"teachers.{name}.datasets" for name in self.run.teachers]
        for name, entry in self.run.taught_by.items():
            ignored += fields_not_read(name, entry)
        return tuple(ignored)

    # --- before anything heavy ---

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from the weights of teachers and student.

        It also has the views that its caches hold, unless it says which.
        """
        settle = super().settle
        entries = self.run.taught_by
        settled, *models = check_all(
            lambda: settle(sources),
            *(
                partial(settled_by_cache, entry, where=source_flag(name))
                if name in self._caches
                else partial(settle_model, entry, sources, where=source_flag(name))
                for name, entry in entries.items()
            ),
        )
        named = {
            name: with_embedding(name, entry, sources)
            for name, entry in zip(entries, models, strict=True)
        }
        run = self._with_grids(settled.with_taught_by(named))
        said = run.task.distillation
        if said.views or not self._caches:
            return run
        section = replace(said, **self._caches.view_fields())
        return replace(run, task=replace(run.task, distillation=section))

    @cached_property
    def _caches(self) -> RunCaches:
        return RunCaches(self.run.taught_by)

    def check(self) -> None:
        """Opens held-out and labelled images, and checks the headers of all weights.

        Losses and normalisers are tried on a few random tokens.
        """
        entries, stored = self.run.taught_by.items(), self.run.task.distillation.cache
        check_all(
            *(
                check
                for name, entry in entries
                for kind in entry.targets
                for check in target_checks(name, entry, kind)
            ),
            self._teaches,
            lambda: self.run.eval.root and self._held_out_images,
            lambda: self.run.eval.knn_root and self._labelled_images,
            *(
                partial(frozen_weights, entry, self.weights, where=source_flag(name))
                for name, entry in entries
                if name not in self._caches
            ),
            *(
                partial(self._caches.check, name, also_stored=stored)
                for name in self._caches.folders
            ),
            self._check_combinations,
            self._check_stored_summaries,
            super().check,
        )

    def _teaches(self) -> list[list[bool]]:
        """Whether a teacher teaches a dataset, as `teaches`; empty if all teach all."""
        if self.run.weighting.rule != "own_data":
            return []
        datasets_of = {name: entry.datasets for name, entry in self.run.teachers.items()}
        return teaches(datasets_of, self.run.data.root, image_mixup=self.run.data.image_mixup)

    def images_together(self) -> int:
        """Returns the number of images of which all mosaics are full."""
        return math.lcm(*(max(1, entry.mosaic) ** 2 for entry in self.run.taught_by.values()))

    def _check_combinations(self) -> None:
        """Refuses settings that do not go together."""
        data, task = self.run.data, self.run.task.distillation
        entries = self.run.taught_by
        stores = bool(self._caches or task.cache)
        if task.teacher_stream:
            check_stream({entry.placement for entry in entries.values()}, stored_maps=stores)
        if self.fixed_views:
            check_fixed_views(task.views, image_mixup=data.image_mixup)
        if stores:
            check_storable(data.image_sizes, {name: e.mosaic for name, e in entries.items()})
        check_mosaics_full(self.images_together(), self.run.batch.micro_batch_size)

    def _check_stored_summaries(self) -> None:
        """Refuses stored maps of a teacher whose summary is not in its map."""
        stores = bool(self.run.task.distillation.cache)
        for name, entry in self.run.taught_by.items():
            if SUMMARY in entry.targets and (stores or name in self._caches):
                with torch.device("meta"):
                    net = self.make_teacher(name).net
                gives_summary = getattr(net, "gives_summary", False)
                check_stored_summary(name, entry, gives_summary=gives_summary)

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of teachers and student."""
        entries = self.run.taught_by.items()
        own = {
            source_flag(name).removeprefix("--"): entry.source
            for name, entry in entries
            if name not in self._caches
        }
        return {**own, **super().sources()}

    def open_samples(self) -> ImageSource:
        """Opens the images of `data.root`, or of its train/ where it has val/ or test/ beside it.

        A dataset's folder is often named whole, and what is tested must not be learnt from.
        """
        data = self.run.data
        samples = open_training(data.root, val_fraction=data.val_fraction)
        if self.fixed_views is not None and self._caches:
            self._caches.require_views(self._view_facts(samples, self.fixed_views))
        if self.run.eval.root and self._caches:
            self._caches.open_held_out(self.held_out(samples), self.view_settings())
        return samples

    def _view_facts(self, samples: ImageSource, fixed: FixedViews) -> dict[str, Any]:
        return view_facts(self.view_settings(), fixed, samples)

    @property
    def fixed_views(self) -> FixedViews | None:
        """What draws views that come again; None: every epoch draws new ones."""
        views = self.run.task.distillation
        return FixedViews(views.views, views.view_seed) if views.views else None

    def view_batches(self, samples: ImageSource, epoch: int) -> ViewBatches:
        """Returns what loads the views of an epoch, and their maps where these are stored."""
        usual, fixed = super().view_batches(samples, epoch), self.fixed_views
        if fixed is None:
            return usual
        beside: Beside | None = None
        if self._recorders is not None:
            beside = self._recorders.beside(
                epoch,
                self._view_facts(samples, fixed),
                self.views_to_store(samples),
                name_of=samples.__getitem__,
                workers=self.run.data.workers,
                max_bad_fraction=self.run.data.max_bad_fraction,
                between=self.between_batches,
            )
        elif self._caches:
            beside = self._caches.beside(epoch % fixed.count, samples)
        return replace(usual, fixed=fixed, beside=beside)

    def views_to_store(self, samples: ImageSource) -> ViewsToStore:
        """Returns what loads the views that come again, on the way into a cache."""
        settings, fixed = self.view_settings(), self.fixed_views
        assert fixed is not None
        return ViewsToStore(
            partial(training_view, samples, settings, fixed),
            settings.image_size,
            cached_batch_size(self.run.batch),
        )

    def held_out(self, samples: ImageSource) -> dict[str, Crops]:
        """Returns what cuts the views of which held-out losses are measured, by their prefix.

        Where training views come again, these are a function of the same seed.

        Args:
            samples: The training images, of which other crops are shown.
        """
        seed = self.fixed_views.seed if self.fixed_views else self.run.runtime.seed
        of = partial(Crops, views=self.run.eval.views, settings=self.view_settings(), seed=seed)
        return {
            "held_out": of(self._held_out_images),
            "unseen_crops": of(samples, skip_bad=True),
        }

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of grey images, and of empty maps where these are stored."""
        return replace(super().probe_batch(size), targets=self._caches.blank_maps(size))

    def tensor_sizes(self) -> TensorSizes:
        """Returns the sizes of the tensors of student and heads, and of teachers; checks the grids.

        Raises: ShapeError: if the maps of student and teacher cannot be aligned.
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
        whole = [teachers[name] for name in teachers.keys() - self._caches.folders.keys()]
        return TensorSizes(sizes_of(task), sizes_of(*whole))

    @cached_property
    def settled(self) -> Run:
        """The recipe with what `settle` makes of its grids; itself once it is settled."""
        return self._with_grids(self.run)

    def _with_grids(self, run: Run) -> Run:
        """Returns the recipe with numbers where it says auto: the teachers' images, the grids.

        Positions follow a teacher's images, unless this job's recipe says their size.

        Args:
            run: The recipe, its models settled.
        """
        entries = {
            name: with_grid(
                name,
                entry,
                run.student,
                image_size=run.data.image_size,
                sides=run.data.image_sizes,
                follows=self.run.taught_by[name].architecture.image_size is None,
            )
            for name, entry in run.taught_by.items()
        }
        return run if entries == run.taught_by else run.with_taught_by(entries)

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns where the teachers' weights are held."""
        entries = self.run.taught_by.items()
        return {f"{name}_teacher_placement".lstrip("_"): entry.placement for name, entry in entries}

    # --- the models ---

    def make_teacher(self, name: str) -> Frozen:
        """Constructs a teacher with random weights; "" is the name of an only one."""
        run = self.settled
        size, sides = run.data.image_size, self._sides[name]
        return teacher_maker(name, run.taught_by[name], size, sides=sides)()

    @cached_property
    def _sides(self) -> Mapping[str, Mapping[int, int]]:
        """Side of each teacher's images by that of the student's, where these have several."""
        run, sides = self.settled, self.run.data.image_sizes
        return {
            name: sides_of(name, entry, run.student, image_size=run.data.image_size, sides=sides)
            if sides
            else {}
            for name, entry in run.taught_by.items()
        }

    def make_teachers(self) -> dict[str, Frozen]:
        """Constructs the teachers with random weights."""
        return {name: self.make_teacher(name) for name in self.run.taught_by}

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the teachers; must run before the student's engine is built."""
        placed: dict[str, PlacedTeacher] = {}
        entries = self.settled.taught_by
        for name, entry in entries.items():
            if name not in self._caches:
                placed[name] = built_teacher(
                    name,
                    entry,
                    partial(self.make_teacher, name),
                    self.weights,
                    student_type="bfloat16" if bfloat16 else "float32",
                    # The same for all: a model is the same one whatever it is called.
                    seed=self.run.runtime.seed + 1,
                    node_size=node_size,
                    persistence_threshold=persistence_threshold,
                )
        found = {**placed, **self._caches.teachers()}
        self._teachers = {name: found[name] for name in entries}
        said = self.run.task.distillation
        if said.cache:
            self._recorders = Recorders(
                placed, entries, folder=said.cache, precision=said.precision
            )

    def take_models_of(self, other: TrainingJob) -> None:
        """Takes the teachers that the job of another student has built."""
        assert isinstance(other, DistillationJob)
        self._teachers, self._recorders = other.teachers, other._recorders
        self._caches.held_out = other._caches.held_out

    def make_task(self) -> Distillation:
        """Constructs student, heads and losses around the run's teachers.

        Raises: ConfigError: if the statistics in a file are of other targets.
        """
        recorders = self._recorders.by_name if self._recorders else {}
        task = self.task_around({**self.teachers, **recorders})
        for target in task.targets:
            if path := statistics_file(self.run.taught_by[target.teacher], target.kind):
                stored = target_statistics.read(path).facts
                own = self.target_facts(task, target)
                with naming_target(target.teacher, target.kind):
                    target_statistics.require_same(stored, own, path)
        return task

    def target_facts(self, task: Distillation, target: NamedTarget) -> Mapping[str, Any]:
        """Returns what decides the tokens that are learnt, besides the images.

        Args:
            task: The task around the run's teachers.
            target: One of its targets.
        """
        return target_facts(
            target,
            task.student,
            self.teachers[target.teacher],
            self.settled.taught_by[target.teacher],
            image_size=self.settled.data.image_size,
            teacher_image_size=self._teacher_image_size(target.teacher),
        )

    def models_on_shapes(self) -> tuple[Distillation, tuple[nn.Module, ...]]:
        """Constructs the task around teachers of its own."""
        teachers = self.make_teachers()
        models = tuple(teachers[name] for name in teachers if name not in self._caches)
        return self.task_around(teachers | self._caches.teachers()), models

    def task_around(self, teachers: Mapping[str, AnyTeacher]) -> Distillation:
        """Constructs student, heads and losses around teachers, which are given by name."""
        entries, size = self.settled.taught_by, self.run.data.image_size
        several = bool(self.run.data.image_sizes)
        student = make_student(self.run.student, image_size=size, resizes_positions=several)
        return composed(
            student,
            teachers,
            make_targets(student, teachers, entries, image_size=size),
            weighting=self.run.weighting,
            teaches=self._teaches(),
            mosaics=[name for name, entry in entries.items() if entry.mosaic],
            teachers_beside=self.run.task.distillation.teacher_stream,
        )

    # --- training ---

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields micro batches of views, with their datasets where these decide the teachers."""
        batches = super().batches(samples, portion)
        if self.run.weighting.rule != "own_data":
            return batches
        datasets_of = cast(Balanced, samples).datasets_of

        def with_datasets(batch: Batch) -> Batch:
            datasets = torch.from_numpy(datasets_of(batch.indices.numpy()))
            if batch.images.is_pinned():
                datasets = datasets.pin_memory()
            return replace(batch, targets={**(batch.targets or {}), DATASETS: datasets})

        return map(with_datasets, batches)

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns losses on images and crops that training never sees, and k-NN accuracy."""
        evaluations = []
        if self.run.eval.root:
            own = not self.run.data.root.startswith(BUILTIN)
            if own and self.run.eval.root.startswith(BUILTIN):
                log.warning(
                    "eval.root: held-out figures and pictures are of the quick start's "
                    "photographs, not of your images; --eval.root FOLDER names yours"
                )
            stored = self._caches.held_out
            sets = distributed.together(
                lambda: [
                    HeldOutViews(
                        name,
                        crops,
                        micro_batch_size=micro_batch_size,
                        stored=StoredMaps(stored, name, crops.name_of) if stored else None,
                    )
                    for name, crops in self.held_out(samples).items()
                ]
            )
            evaluations.append(held_out_losses(sets, engine, every=self.run.eval.every))
        if self.run.eval.knn_root:
            evaluations.append(
                knn_accuracy(
                    engine,
                    *self._labelled_images,
                    Path(self.run.run_dir()) / "features",
                    every=self.run.eval.knn_every,
                    image_size=self.run.data.image_size,
                    micro_batch_size=micro_batch_size,
                    workers=self.run.data.workers,
                    max_pixels=self.run.data.max_pixels,
                    blank_maps=self._caches.blank_maps(1),
                )
            )
        return evaluations

    def hooks(self) -> Sequence[Hook]:
        """Returns what writes the maps of some images, and the canaries of the teachers."""
        every, size = self.run.runtime.canary_every, self.run.data.image_size
        hooks: list[Hook] = [FeaturePanel()]
        for name, teacher in self.placed.items() if every else ():
            hooks.append(
                Canary(
                    every,
                    teacher=name,
                    shard_of=teacher.shard_hash,
                    map_of=partial(teacher.map_of_fixed_images, size),
                    seconds=seconds_of_product if len(hooks) == 1 else None,
                )
            )
        return hooks

    def evaluated(self, first: Mapping[str, float], last: Mapping[str, float]) -> Mapping[str, Any]:
        """Returns the newest numbers, and the held-out loss before training."""
        own = {name: value for name, value in last.items() if name != "held_out_best_constant"}
        named = {
            "held_out_loss_start": first.get("held_out_loss"),
            "loss_best_constant": last.get("held_out_best_constant"),
        }
        return {**super().evaluated({}, {}), **named, **own}

    # --- checkpoints, and what others take from them ---

    def summary(self) -> Mapping[str, Any]:
        """Returns the first entries of summary.json; several teachers have one of their own."""
        if not self.run.teachers:
            return {**super().summary(), **self._early()}
        teachers = {
            name: {"model": entry.model, "source": entry.source}
            for name, entry in self.run.teachers.items()
        }
        own = {"recipe": self.run.name, "student": self.run.student.model}
        return {**own, "teacher": None, "teachers": teachers, **self._early()}

    def _early(self) -> dict[str, list[int]]:
        """The epochs that `Recorders.early` lists, which grow with the run."""
        return {EARLY: self._recorders.early} if self._recorders else {}

    def facts(self) -> Mapping[str, Any]:
        """Returns each teacher's source and hash, and the hashes of its files of statistics."""
        facts = {name: self._facts_of(name) for name in self.run.taught_by}
        return {**({"teachers": facts} if self.run.teachers else facts[ONLY]), **self._early()}

    def _facts_of(self, name: str) -> dict[str, Any]:
        cache = self._caches.readers.get(name)
        return facts_of(self.run.taught_by[name], self.teachers[name].fingerprint, cache)

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that learned from another teacher, or by other statistics."""
        stored = facts_by_teacher(manifest, several=bool(self.run.teachers))
        require_same_teachers(self.run.taught_by, stored, self._facts_of)
        if self._recorders:
            early = self._recorders.early
            early[:] = sorted({*early, *manifest.get(EARLY, ())})

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the teachers, by their names; an only one is called teacher."""
        entries = dict(self.settled.taught_by)
        for name, source in self._caches.sources().items():
            entries[name] = replace(entries[name], source=source)
        return {
            name or "teacher": FrozenPart(entry, self._teacher_image_size(name))
            for name, entry in entries.items()
        }

    def _teacher_image_size(self, name: str) -> int:
        """Side of a teacher's images in evaluations, 0 as in `frozen_maker`."""
        size = self._sides[name].get(
            self.run.data.image_size, self.settled.taught_by[name].teacher_image_size
        )
        if not isinstance(size, int):
            field = f"teachers.{name}" if name else "objective"
            raise ConfigError(
                f"{field}.teacher_image_size: not known of this run; got {size!r}, expected a side "
                "in pixels, which a run records. Name the teacher by its own source instead."
            )
        return size

    @cached_property
    def _held_out_images(self) -> ImageSource:
        return open_images(self.run.eval.root, where="eval.root")

    @cached_property
    def _labelled_images(self) -> tuple[LabelledImages, LabelledImages]:
        root, where = self.run.eval.knn_root, "eval.knn_root"
        fraction = 0.0 if has_parts(root, where=where) else self.run.data.val_fraction
        train_set = open_split(root, "train", val_fraction=fraction, where=where)
        return train_set, open_split(
            root, "val", train_set.classes, val_fraction=fraction, where=where
        )
