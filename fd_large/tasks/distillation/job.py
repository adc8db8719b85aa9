"""The job of distillation: images without labels, a frozen teacher, held-out losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fd_large import distributed, doors, meeting
from fd_large.backbones.exports import PROJECTION
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.data.balanced import Balanced
from fd_large.data.labelled import LabelledImages, has_parts, open_split, open_training
from fd_large.data.loader import Batch, Beside, ViewBatches
from fd_large.data.photographs import PREFIX as BUILTIN
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.data.views import FixedViews
from fd_large.engine.checkpoint_models import fill_stored
from fd_large.engine.evaluation import Evaluation, Panel
from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.engine.job import FrozenPart, Job
from fd_large.engine.student import make_student
from fd_large.engine.zero.engine import Engine
from fd_large.errors import CheckpointError, FDError, check_all
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import require
from fd_large.recipes.run import ONLY, Run
from fd_large.recipes.sections import RANDOM
from fd_large.runtime.hooks import Hook
from fd_large.tasks.distillation import cached_held_out, cached_teacher, target_statistics
from fd_large.tasks.distillation.cache_files import CacheReader, CacheWriter, Header
from fd_large.tasks.distillation.cache_recorder import Recorder, ToRecord
from fd_large.tasks.distillation.cache_views import (
    StoredMaps,
    ViewsToStore,
    blank,
    set_of,
    training_view,
)
from fd_large.tasks.distillation.cached_teacher import CachedTeacher
from fd_large.tasks.distillation.canary import Canary, seconds_of_product
from fd_large.tasks.distillation.combinations import (
    check_fixed_views,
    check_mosaics_full,
    check_storable,
    check_stream,
)
from fd_large.tasks.distillation.embedding import projection_of, with_embedding
from fd_large.tasks.distillation.feature_panel import FeaturePanel
from fd_large.tasks.distillation.heads.map_head import WHERE as HEAD_WHERE
from fd_large.tasks.distillation.heads.registry import HEADS
from fd_large.tasks.distillation.held_out import Crops, HeldOutViews
from fd_large.tasks.distillation.knn_accuracy import knn_accuracy
from fd_large.tasks.distillation.losses import check_loss, make_loss
from fd_large.tasks.distillation.model_card import learned
from fd_large.tasks.distillation.model_fit import check_fit, maps_of
from fd_large.tasks.distillation.normalisers import (
    BY_STATISTICS,
    RUNNING,
    WHITENING,
    check_normaliser,
    make_normaliser,
)
from fd_large.tasks.distillation.own_data import teaches
from fd_large.tasks.distillation.section import (
    CACHED,
    MAP,
    SUMMARY,
    NamedTeacher,
    cached_folder,
    field_of,
    label,
    naming_target,
)
from fd_large.tasks.distillation.stored_heads import StoredHead, fill_heads, read_heads, write
from fd_large.tasks.distillation.stored_teachers import STATISTICS, require_same_teacher
from fd_large.tasks.distillation.target import Target
from fd_large.tasks.distillation.task import DATASETS, Distillation
from fd_large.tasks.distillation.teacher import PlacedTeacher, place
from fd_large.tasks.distillation.teacher_grids import (
    called,
    sides_of,
    source_flag,
    teacher_maker,
    with_grid,
)
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import origin_of
from fd_large.weights.settle import settle_model
from fd_large.weights.source import Sources

log = logging.getLogger(__name__)


class DistillationJob(Job):
    """The student learns the teacher's feature map."""

    memory_remedy = "--teacher.placement sharded"
    loss_name = "the run's own objective"
    _teachers: Mapping[str, PlacedTeacher | CachedTeacher] | None = None
    # Those whose maps are stored, and what reads them from there.
    _recorders: Mapping[str, Recorder] = MappingProxyType({})
    _written: Mapping[str, CacheReader] = MappingProxyType({})
    _held_out_readers: Mapping[str, CacheReader] = MappingProxyType({})
    _words: ClassVar = {
        "held_out/loss": "held-out loss",
        "held_out/cosine": "held-out cosine",
        "held_out/best_constant": "held-out constant-prediction baseline",
        "unseen_crops/loss": "unseen-crops loss",
        "unseen_crops/cosine": "unseen-crops cosine",
        "unseen_crops/best_constant": "unseen-crops constant-prediction baseline",
        "test/knn": "test k-NN accuracy (%)",
    }

    @property
    def metrics(self) -> Mapping[str, str]:
        """The words for this task's numbers; the loss brings its own."""
        if not self.run.teachers:
            objective = self.run.objective
            return {"loss": make_loss(objective.loss, beta=objective.beta).label, **self._words}
        words = {"loss": "sum of the losses", **self._words}
        for of in self._labels():
            said = of.replace("_", " ")
            for images in ("held_out", "unseen_crops"):
                for name in ("loss", "cosine", "best_constant"):
                    usual = self._words[f"{images}/{name}"]
                    words[f"{images}/{of}_{name}"] = f"{usual} ({said})"
        return words

    @property
    def learns_from_images_alone(self) -> bool:  # type: ignore[override]
        """Not where its dataset or a stored map is needed too: an incident does not hold it."""
        stored = self._caches or self.run.task.distillation.cache
        return self.run.weighting.rule != "own_data" and not stored

    @property
    def lower_is_better(self) -> tuple[str, ...]:  # type: ignore[override]
        """The loss, and that of each target."""
        return ("loss", *(f"{one}_loss" for one in self._labels()))

    def _labels(self) -> list[str]:
        """The labels of several teachers' targets."""
        entries = self.run.teachers.items()
        return [label(name, kind) for name, entry in entries for kind in entry.targets]

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
            of = partial(field_of, name)
            with naming_target(name):
                losses = [
                    make_loss(entry.setting("loss", kind), beta=entry.beta)
                    for kind in entry.targets
                ]
            normalisers = {kind: entry.setting("normaliser", kind) for kind in entry.targets}
            if not any(loss.reads_beta for loss in losses):
                ignored.append(of("beta"))
            if WHITENING not in normalisers.values():
                ignored.append(of("whitening_eps"))
            if normalisers.get(MAP) not in BY_STATISTICS:
                ignored.append(of("target_statistics"))
            if name and normalisers.get(SUMMARY) not in BY_STATISTICS:
                ignored.append(of("target_statistics", SUMMARY))
        return tuple(ignored)

    # --- before anything heavy ---

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from the weights of teachers and student."""
        settle = super().settle
        entries = self.run.taught_by
        settled, *models = check_all(
            lambda: settle(sources),
            *(
                partial(cached_teacher.settled, entry, where=source_flag(name))
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
        return self._with_stored_views(run)

    def _with_stored_views(self, run: Run) -> Run:
        """Returns the recipe with the views that its caches hold, unless it says which."""
        said = run.task.distillation
        for name in self._caches if not said.views else ():
            facts = self._readers[name].header.facts
            stored = {f: facts[f"task.distillation.{f}"] for f in ("views", "view_seed")}
            task = replace(run.task, distillation=replace(said, **stored))
            return replace(run, task=task)
        return run

    @property
    def _caches(self) -> Mapping[str, Path]:
        """The folders of cached targets, by the teacher's name."""
        folders = {n: cached_folder(entry.source) for n, entry in self.run.taught_by.items()}
        return {name: Path(folder) for name, folder in folders.items() if folder}

    @cached_property
    def _readers(self) -> Mapping[str, CacheReader]:
        """What reads the cached targets, by the teacher's name.

        Raises: CacheError: if a header is missing or damaged.
        """
        return {
            name: CacheReader(folder, Header.read(folder, where=source_flag(name)))
            for name, folder in self._caches.items()
        }

    def check(self) -> None:
        """Opens held-out and labelled images, and checks the headers of all weights.

        Losses and normalisers are tried on a few random tokens.
        """
        entries = self.run.taught_by.items()
        check_all(
            *(
                check
                for name, entry in entries
                for kind in entry.targets
                for check in _checks(name, entry, kind)
            ),
            self._teaches,
            lambda: self.run.eval.root and self._held_out_images,
            lambda: self.run.eval.knn_root and self._labelled_images,
            *(
                partial(frozen_weights, entry, self.weights, where=source_flag(name))
                for name, entry in entries
                if name not in self._caches
            ),
            *(partial(self._check_cache, name) for name in self._caches),
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
            if SUMMARY not in entry.targets or not (stores or name in self._caches):
                continue
            with torch.device("meta"):
                net = self.make_teacher(name).net
            require(
                not (entry.embedding_width or getattr(net, "gives_summary", False)),
                f"{field_of(name, 'targets')}: a stored map does not hold this summary",
                " ".join(entry.targets),
                MAP,
                "Learn the map alone, or store no maps",
            )

    def _check_cache(self, name: str) -> None:
        """Refuses a cache that is not whole."""
        where, folder = source_flag(name), self._caches[name]
        require(
            not self.run.task.distillation.cache,
            "task.distillation.cache: there is no teacher whose maps could be stored",
            f"{self.run.task.distillation.cache} beside {where} {CACHED}{folder}",
            "one of the two",
            "Leave one of them out",
        )
        meeting.once(f"cache {folder}", lambda: self._readers[name].check_whole(where=where))

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
        if self.fixed_views is not None:
            views = cached_teacher.view_facts(self.view_settings(), self.fixed_views, samples)
            for name, reader in self._readers.items():
                cached_teacher.require_same_views(reader.header, views, where=source_flag(name))
        if self.run.eval.root and self._readers:
            facts = cached_held_out.facts_of(self.held_out(samples), self.view_settings())
            self._held_out_readers = {
                name: cached_held_out.reader_of(reader.folder, reader.header, facts)
                for name, reader in self._readers.items()
            }
        return samples

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
        view, beside = epoch % fixed.count, None
        if self._recorders:
            beside = self._recorded(samples, epoch, view)
        elif self._readers:
            beside = StoredMaps(self._readers, set_of(view), samples.__getitem__)
        return replace(usual, fixed=fixed, beside=beside)

    def _recorded(self, samples: ImageSource, epoch: int, view: int) -> Beside:
        """Returns what stores the maps of a view, or what reads them once they are all there.

        A collective.
        """
        run, fixed = self.run, self.fixed_views
        assert fixed is not None
        if not self._written:
            facts = cached_teacher.view_facts(self.view_settings(), fixed, samples)
            self._written = {
                name: recorder.begin(
                    CacheWriter(
                        Path(run.task.distillation.cache, name),
                        cached_teacher.header_of(
                            self.placed[name],
                            run.taught_by[name],
                            facts,
                            precision=run.task.distillation.precision,
                        ),
                    )
                )
                for name, recorder in self._recorders.items()
            }
        missing = [name for name, one in self._recorders.items() if not one.is_whole(view)]
        if epoch < fixed.count and missing:
            return ToRecord(tuple(missing), view)
        views = self.views_to_store(samples)
        for recorder in self._recorders.values():
            recorder.complete(
                view,
                views,
                workers=run.data.workers,
                max_bad_fraction=run.data.max_bad_fraction,
                between=self.between_batches,
            )
        return StoredMaps(self._written, set_of(view), samples.__getitem__)

    def views_to_store(self, samples: ImageSource) -> ViewsToStore:
        """Returns what loads the views that come again, on the way into a cache."""
        settings, fixed = self.view_settings(), self.fixed_views
        assert fixed is not None
        return ViewsToStore(
            partial(training_view, samples, settings, fixed),
            settings.image_size,
            cached_teacher.batch_size(self.run.batch),
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
        return replace(super().probe_batch(size), targets=self._blank_maps(size))

    def _blank_maps(self, size: int) -> Any:
        """Empty stored maps of so many images; None if no map is stored."""
        if not self._readers:
            return None
        return {
            name: tuple(part.expand(size, *part.shape) for part in blank(reader))
            for name, reader in self._readers.items()
        }

    @cached_property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the tensors that are trained, and of the teachers'; checks the grids."""
        with torch.device("meta"):
            teachers = self.make_teachers()
            task = self.task_around(teachers)
        run = self._settled
        fits = partial(
            check_fit,
            *(task, teachers, run.taught_by),
            image_size=run.data.image_size,
            sizes=run.data.image_sizes,
        )
        check_all(*(partial(fits, size) for size in run.data.sides))
        whole = [teachers[name] for name in teachers.keys() - self._caches.keys()]
        frozen = tuple(p.numel() for model in whole for p in model.parameters())
        return tuple(p.numel() for p in task.parameters()), frozen

    def parameter_sizes(self) -> tuple[int, ...]:
        """Returns the sizes of the tensors of student, heads and teachers; checks the grids.

        Raises: ShapeError: if the maps of student and teacher cannot be aligned.
        """
        trained, frozen = self._sizes
        return trained + frozen

    def trained_sizes(self) -> tuple[int, ...]:
        """Returns the sizes of the tensors of student and heads."""
        trained, _ = self._sizes
        return trained

    @cached_property
    def _settled(self) -> Run:
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

    def splits_models(self) -> bool:
        """Returns whether a teacher is sharded."""
        entries = self.run.taught_by.items()
        return any(e.placement != "replicated" for n, e in entries if n not in self._caches)

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns where the teachers' weights are held."""
        entries = self.run.taught_by.items()
        return {f"{name}_teacher_placement".lstrip("_"): entry.placement for name, entry in entries}

    # --- the models ---

    def make_teacher(self, name: str) -> Frozen:
        """Constructs a teacher with random weights; "" is the name of an only one."""
        run = self._settled
        size, sides = run.data.image_size, self._sides[name]
        return teacher_maker(name, run.taught_by[name], size, sides=sides)()

    @cached_property
    def _sides(self) -> Mapping[str, Mapping[int, int]]:
        """Side of each teacher's images by that of the student's, where these have several."""
        run, sides = self._settled, self.run.data.image_sizes
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
        student_type = "bfloat16" if bfloat16 else "float32"
        placed: dict[str, PlacedTeacher | CachedTeacher] = {}
        for name, entry in self._settled.taught_by.items():
            where, title = source_flag(name), called(name)
            if name in self._caches:
                placed[name] = CachedTeacher(self._readers[name], where=where)
                continue
            weights = frozen_weights(entry, self.weights, where=where)
            if entry.source == RANDOM:
                log.warning(
                    "%s: RANDOM weights (%s random): there is nothing to learn", title, where
                )
            teacher = place(
                partial(self.make_teacher, name),
                placement=entry.placement,
                dtype=getattr(torch, student_type if entry.dtype == "auto" else entry.dtype),
                # The same for all: a model is the same one whatever it is called.
                seed=self.run.runtime.seed + 1,
                node_size=node_size,
                persistence_threshold=persistence_threshold,
                weights=weights,
                whole_first=resolve(entry.model, entry.architecture).whole_first,
                where=where,
            )
            log.debug(
                "%s: %s, %s, %.1f MB on this rank, hash %s",
                title,
                entry.model,
                entry.placement,
                teacher.held_bytes() / 1e6,
                teacher.fingerprint,
            )
            if entry.embedding_width:
                found = projection_of(name, entry, self.weights)
                teacher.projection = found.float().to(distributed.device())
            placed[name] = teacher
        self._teachers = placed
        if self.run.task.distillation.cache:
            where = "task.distillation.cache"
            self._recorders = {n: Recorder(one, where=where) for n, one in self.placed.items()}

    def take_models_of(self, other: Job) -> None:
        """Takes the teachers that the job of another student has built."""
        assert isinstance(other, DistillationJob)
        self._teachers, self._recorders = other.teachers, other._recorders
        self._held_out_readers = other._held_out_readers

    def make_task(self) -> Distillation:
        """Constructs student, heads and losses around the run's teachers.

        Raises: ConfigError: if the statistics in a file are of other targets.
        """
        task = self.task_around({**self.teachers, **self._recorders})
        for target in task.targets:
            if path := self._statistics_file(target.teacher, target.kind):
                stored = target_statistics.read(path).facts
                own = self.target_facts(task, target)
                with naming_target(target.teacher, target.kind):
                    target_statistics.require_same(stored, own, path)
        return task

    def target_facts(self, task: Distillation, target: Target) -> Mapping[str, Any]:
        """Returns what decides the tokens that are learnt, besides the images.

        Args:
            task: The task around the run's teachers.
            target: One of its targets.
        """
        run, teacher = self._settled, self.teachers[target.teacher]
        size, entry = run.data.image_size, run.taught_by[target.teacher]
        facts: dict[str, Any] = {
            "teacher_hash": teacher.fingerprint,
            "layer": entry.layer,
            "image_size": size,
            "teacher_image_size": self._teacher_image_size(target.teacher),
        }
        if target.kind == SUMMARY:
            width = entry.width_of(SUMMARY, teacher.width)
            return {**facts, "kind": SUMMARY, "width": width}
        grid = task.student.grid(size, size)
        prefix = target.given(grid, task.student.num_prefix_tokens)[1]
        return {
            **facts,
            "interpolation": entry.interpolation,
            "grid": list(target.places(grid, getattr(teacher, "module", teacher).grid(size))),
            "prefix_tokens": 0 if SUMMARY in entry.targets else prefix,
            "width": teacher.width,
        }

    def models_on_shapes(self) -> tuple[Distillation, tuple[nn.Module, ...]]:
        """Constructs the task around teachers of its own."""
        teachers = self.make_teachers()
        models = tuple(teachers[name] for name in teachers if name not in self._caches)
        cached = {n: CachedTeacher(one, where=source_flag(n)) for n, one in self._readers.items()}
        return self.task_around(teachers | cached), models

    def task_around(
        self, teachers: Mapping[str, Frozen | PlacedTeacher | CachedTeacher | Recorder]
    ) -> Distillation:
        """Constructs student, heads and losses around teachers, which are given by name."""
        entries = self._settled.taught_by
        doors.require_allowed(
            {
                field_of(name, slot, kind): entry.setting(slot, kind)
                for name, entry in entries.items()
                for kind in entry.targets
                for slot in ("head", "loss", "normaliser")
            }
        )
        size = self.run.data.image_size
        several = bool(self.run.data.image_sizes)
        student = make_student(self.run.student, image_size=size, resizes_positions=several)
        targets = [
            Target(
                student.width,
                entry.width_of(kind, teachers[name].width),
                teacher=name,
                kind=kind,
                loss=entry.setting("loss", kind),
                normaliser=entry.setting("normaliser", kind),
                head=entry.setting("head", kind),
                maps=partial(
                    maps_of,
                    student,
                    getattr(teachers[name], "module", teachers[name]),
                    size,
                    kind=kind,
                    with_prefix=SUMMARY not in entry.targets,
                ),
                beta=entry.beta,
                whitening_eps=entry.whitening_eps,
                target_statistics=entry.setting("target_statistics", kind),
                interpolation=entry.interpolation,
                with_prefix=SUMMARY not in entry.targets,
                weight=entry.weight_of(kind),
                projection=_projection(entry, kind, teachers[name]),
            )
            for name, entry in entries.items()
            for kind in entry.targets
        ]
        return Distillation(
            student,
            teachers,
            targets,
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
            evaluations.append(self._held_out_losses(engine, samples, micro_batch_size))
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
                    blank_maps=self._blank_maps(1),
                )
            )
        return evaluations

    def _held_out_losses(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Evaluation:
        sets = distributed.together(
            lambda: [
                HeldOutViews(
                    name,
                    crops,
                    micro_batch_size=micro_batch_size,
                    stored=self._held_out_readers,
                )
                for name, crops in self.held_out(samples).items()
            ]
        )

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], Panel | None]:
            metrics: dict[str, float] = {}
            for views in sets:
                metrics |= views.measure(engine, between)
                if last:
                    metrics |= views.best_constant(engine, between)
            return metrics, sets[0].panel(engine) if step == 0 or last else None

        return Evaluation(measure, self.run.eval.every)

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
            return super().summary()
        teachers = {
            name: {"model": entry.model, "source": entry.source}
            for name, entry in self.run.teachers.items()
        }
        own = {"recipe": self.run.name, "student": self.run.student.model}
        return {**own, "teacher": None, "teachers": teachers}

    def facts(self) -> Mapping[str, Any]:
        """Returns each teacher's source and hash, and the hashes of its files of statistics."""
        facts = {name: self._facts_of(name) for name in self.run.taught_by}
        return {"teachers": facts} if self.run.teachers else facts[ONLY]

    def _facts_of(self, name: str) -> dict[str, Any]:
        entry = self.run.taught_by[name]
        facts = {
            "teacher_source": entry.source,
            "teacher_hash": self.teachers[name].fingerprint,
        }
        if reader := self._readers.get(name):
            facts |= {"teacher_source": reader.header.teacher["source"]}
            facts |= {"cached_targets": f"{reader.header.digest}, {reader.header.precision}"}
        for kind, key in STATISTICS.items():
            if path := self._statistics_file(name, kind):
                facts[key] = target_statistics.read(path).digest
        return facts

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that learned from another teacher, or by other statistics."""
        stored = manifest.get("teachers", {}) if self.run.teachers else {ONLY: manifest}
        if stored.keys() != self.run.taught_by.keys():
            raise CheckpointError(
                "teachers: not the teachers that this run began with; got "
                f"{', '.join(self.run.teachers)}, expected {', '.join(stored) or 'one teacher'}. "
                "Give those, or --fresh."
            )
        for name, entry in self.run.taught_by.items():
            require_same_teacher(name, entry, stored[name], self._facts_of(name))

    def _statistics_file(self, name: str, kind: str) -> str:
        """The file of statistics that a target is normalised by; empty where it needs none."""
        entry = self.run.taught_by[name]
        if kind not in entry.targets or entry.setting("normaliser", kind) not in BY_STATISTICS:
            return ""
        return entry.setting("target_statistics", kind)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the projection if the library's files hold it.

        The whole task is checked, whatever part of it goes out, but for a head of the user's own,
        whose code may not be allowed.
        """
        if not self._projects:
            stream.check(reader, dict(student), prefix=stream.STUDENT)
            return {}
        sizes = reader.layout.sizes
        width = sizes.get(f"{PROJECTION}bias", 0)
        projection = {
            f"{PROJECTION}weight": (width, sizes.get(f"{PROJECTION}weight", 0) // max(width, 1)),
            f"{PROJECTION}bias": (width,),
        }
        whole = {f"{stream.STUDENT}{name}": shape for name, shape in student.items()}
        if self.run.objective.normaliser in RUNNING:
            whole |= {f"running.{MAP}.{name}": (2, width) for name in ("mean", "deviation")}
        stream.check(reader, whole | projection)
        return projection if to == "fd" else {}

    def stored_heads(self, reader: Reader) -> Mapping[str, StoredHead]:
        """Returns the heads of a checkpoint by their targets' labels; "teacher" for the only one.

        Only they have memory; of all else the shapes are compared with the checkpoint's.

        Args:
            reader: The checkpoint.
        """
        with torch.device("meta"):
            teachers = self.make_teachers()
            task = self.task_around(teachers)
        return fill_heads(
            task,
            teachers,
            self._settled.taught_by,
            image_size=self.run.data.image_size,
            fill=lambda: fill_stored(task, reader, kind=stream.outcome(reader)),
        )

    def export_heads(self, reader: Reader, folder: Path, shard_size: int) -> None:
        """Writes the heads of all teachers, where the models beside them can be made again."""
        try:
            heads = self.stored_heads(reader)
        except FDError as error:
            log.warning("export: the heads are left out, the student is whole: %s", error)
            return
        write(heads, folder, task=self.run.task.name, shard_size=shard_size)

    exported_heads = staticmethod(read_heads)

    def learned(self, manifest: Mapping[str, Any]) -> Learned:
        """Returns what the model card says of teachers, losses and crops."""
        unknown = "not recorded"
        facts = manifest.get("teachers", {}) if self.run.teachers else {ONLY: manifest}
        entries = {
            # The source of cached targets is a folder; the manifest names the teacher.
            name: replace(entry, source=facts.get(name, {}).get("teacher_source", entry.source))
            if cached_folder(entry.source)
            else entry
            for name, entry in self.run.taught_by.items()
        }
        return learned(
            entries,
            {
                name: origin_of(entry.source, entry.model, resolve(entry.model, entry.architecture))
                for name, entry in entries.items()
            },
            hashes={
                name: facts.get(name, {}).get("teacher_hash", unknown)
                for name in self.run.taught_by
            },
            data=self.run.data,
        )

    @property
    def _projects(self) -> bool:
        return not self.run.teachers and self.run.objective.head == "linear"

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the teachers, by their names; an only one is called teacher."""
        entries = dict(self._settled.taught_by)
        for name, reader in self._readers.items():
            entries[name] = replace(entries[name], source=reader.header.teacher["source"])
        return {
            name or "teacher": FrozenPart(entry, self._teacher_image_size(name))
            for name, entry in entries.items()
        }

    def _teacher_image_size(self, name: str) -> int:
        """Side of a teacher's images in evaluations, 0 as in `frozen_maker`."""
        size = self._sides[name].get(
            self.run.data.image_size, self._settled.taught_by[name].teacher_image_size
        )
        assert isinstance(size, int)
        return size

    def in_one_process(self) -> Run:
        """Returns the recipe with the teachers whole on their rank."""
        entries = self.run.taught_by.items()
        return self.run.with_taught_by(
            {name: replace(entry, placement="replicated") for name, entry in entries}
        )

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


def _checks(name: str, entry: NamedTeacher, kind: str) -> Iterator[Callable[[], object]]:
    """Yields what tries loss and normaliser of a target, and finds its head.

    The head's shapes wait for the models.
    """
    loss, normaliser, head, file = (
        entry.setting(one, kind) for one in ("loss", "normaliser", "head", "target_statistics")
    )

    def told(check: Callable[[], object]) -> None:
        with naming_target(name, kind):
            check()

    for check in (
        lambda: check_loss(make_loss(loss, beta=entry.beta), loss),
        lambda: check_normaliser(
            make_normaliser(normaliser, eps=entry.whitening_eps, statistics=file), normaliser
        ),
        lambda: doors.load(head, kind="heads", where=HEAD_WHERE, built_in=HEADS),
    ):
        yield partial(told, check)


def _projection(entry: NamedTeacher, kind: str, teacher: Any) -> Tensor | None:
    """The projection of a placed teacher's summary; of others one of the same shape."""
    if kind != SUMMARY or not entry.embedding_width:
        return None
    held: Tensor | None = getattr(teacher, "projection", None)
    return torch.empty(entry.embedding_width, teacher.width) if held is None else held
