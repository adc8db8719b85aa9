"""The job of distillation: images without labels, a frozen teacher, held-out losses."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fd_large import activity, distributed, doors
from fd_large.backbones.custom.custom import check_map
from fd_large.backbones.exports import PROJECTION
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import family_of, own_image_size
from fd_large.backbones.statistics import IMAGENET
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.data.labelled import LabelledImages, has_parts, open_split, open_training
from fd_large.data.photographs import PREFIX as BUILTIN
from fd_large.data.source import ImageSource, open_images
from fd_large.engine.evaluation import Evaluation, Panel, evaluating
from fd_large.engine.frozen import Frozen, frozen_maker, frozen_weights
from fd_large.engine.heads import check_head
from fd_large.engine.job import FrozenPart, Job
from fd_large.engine.student import make_student
from fd_large.engine.zero.engine import Engine
from fd_large.errors import CheckpointError, FDError, ShapeError, check_all
from fd_large.probes import knn
from fd_large.probes.features import extract
from fd_large.recipes.architectures import resolve
from fd_large.recipes.run import Run
from fd_large.recipes.sections import AUTO, RANDOM, FrozenModel
from fd_large.runtime.hooks import Hook
from fd_large.tasks.distillation import heads, target_statistics
from fd_large.tasks.distillation.alignment import Grid, check_grids, teacher_side
from fd_large.tasks.distillation.canary import Canary
from fd_large.tasks.distillation.feature_panel import FeaturePanel
from fd_large.tasks.distillation.held_out import HeldOutViews
from fd_large.tasks.distillation.losses import check_loss, make_loss
from fd_large.tasks.distillation.model_card import learned
from fd_large.tasks.distillation.normalisers import (
    BY_STATISTICS,
    WHITENING,
    check_normaliser,
    make_normaliser,
)
from fd_large.tasks.distillation.task import Distillation
from fd_large.tasks.distillation.teacher import PlacedTeacher, place
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import origin_of
from fd_large.weights.settle import settle_model
from fd_large.weights.source import Sources

log = logging.getLogger(__name__)

SOURCE = "--teacher.source"


class DistillationJob(Job):
    """The student learns the teacher's feature map."""

    memory_remedy = "--teacher.placement sharded"
    learns_from_images_alone = True
    loss_name = "the run's own objective"
    _teacher: PlacedTeacher | None = None
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
        objective = self.run.objective
        return {"loss": make_loss(objective.loss, beta=objective.beta).label, **self._words}

    @property
    def teacher(self) -> PlacedTeacher:
        """The frozen teacher; only after `build`."""
        assert self._teacher is not None
        return self._teacher

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields that this recipe's loss or normaliser does not read."""
        objective = self.run.objective
        no_beta = not make_loss(objective.loss, beta=objective.beta).reads_beta
        no_eps = objective.normaliser != WHITENING
        fields = {
            "objective.beta": no_beta,
            "objective.whitening_eps": no_eps,
            "objective.target_statistics": not self._uses_statistics,
        }
        return tuple(name for name, ignored in fields.items() if ignored)

    # --- before anything heavy ---

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from the weights of teacher and student."""
        settle = super().settle
        settled, teacher = check_all(
            lambda: settle(sources),
            lambda: settle_model(self.run.teacher, sources, where=SOURCE),
        )
        return self._met(replace(settled, teacher=teacher))

    def check(self) -> None:
        """Opens held-out and labelled images, and checks the headers of all weights.

        Loss and normaliser are tried on a few random tokens.
        """
        check_all(
            self._check_loss,
            self._check_normaliser,
            self._check_head,
            lambda: self.run.eval.root and self._held_out_images,
            lambda: self.run.eval.knn_root and self._labelled_images,
            lambda: frozen_weights(self.run.teacher, self.weights, where=SOURCE),
            super().check,
        )

    def _check_loss(self) -> None:
        objective = self.run.objective
        check_loss(make_loss(objective.loss, beta=objective.beta), objective.loss)

    def _check_normaliser(self) -> None:
        objective = self.run.objective
        normaliser = make_normaliser(
            objective.normaliser,
            eps=objective.whitening_eps,
            statistics=objective.target_statistics,
        )
        check_normaliser(normaliser, objective.normaliser)

    def _check_head(self) -> None:
        # Its shapes wait for the models.
        doors.load(self.run.objective.head, kind="heads", where=heads.WHERE, built_in=heads.HEADS)

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of teacher and student."""
        return {"teacher.source": self.run.teacher.source, **super().sources()}

    def open_samples(self) -> ImageSource:
        """Opens the images of `data.root`, or of its train/ where it has val/ or test/ beside it.

        A dataset's folder is often named whole, and what is tested must not be learnt from.
        """
        data = self.run.data
        return open_training(data.root, val_fraction=data.val_fraction)

    def parameter_sizes(self) -> tuple[int, ...]:
        """Returns the sizes of the tensors of student, projection and teacher; checks the grids.

        Raises: ShapeError: if the maps of student and teacher cannot be aligned.
        """
        with torch.device("meta"):
            teacher = self.make_teacher()
            task = self.task_around(teacher)
        run = self._settled
        size, objective = run.data.image_size, run.objective
        side = teacher.image_size or size
        if run.teacher_architecture().code:
            check_map(teacher.net, side, is_trained=False, where="teacher.source")
        check_head(
            task.projection,
            objective.head,
            (2, 3, task.student.width),
            teacher.width,
            where=heads.WHERE,
        )
        grid = _grid("student", task.student.grid, size)
        theirs = _grid("teacher", teacher.net.grid, side)
        check_grids(grid, theirs, interpolation=objective.interpolation)
        log.info(
            "grids: teacher %dx%d (images of %d px), student %dx%d (images of %d px): %s",
            *(*theirs, side, *grid, size),
            "equal" if grid == theirs else "the teacher's map is resized (bilinear)",
        )
        return tuple(p.numel() for model in (task, teacher) for p in model.parameters())

    @cached_property
    def _settled(self) -> Run:
        """The recipe with what `settle` makes of its grids; itself once it is settled."""
        return self._met(self.run)

    def _met(self, run: Run) -> Run:
        """Returns the recipe with numbers where it says auto: the teacher's images, the two grids.

        Positions follow the teacher's images, unless this job's recipe says their size.

        Args:
            run: The recipe, its models settled.
        """
        objective, size = run.objective, run.data.image_size
        is_automatic = AUTO in (objective.interpolation, objective.teacher_image_size)
        if not is_automatic or run.teacher.model == AUTO:
            return run
        architecture, section = run.teacher_architecture(), run.teacher
        asked = self.run.teacher.architecture.image_size
        follows = asked is None and family_of(architecture).resizes(architecture)
        with torch.device("meta"):
            student = make_student(run.student, image_size=size)
        wanted = _grid("student", student.grid, size)

        def at(side: int) -> tuple[Grid | None, FrozenModel]:
            """The teacher's grid for images of a side, 0 as in `frozen_maker`; and its section."""
            resized = replace(section, architecture=replace(section.architecture, image_size=side))
            for model in (section, resized) if follows and side else (section,):
                # What is wrong at any size is told by the first call.
                with torch.device("meta"), suppress(FDError if side else ShapeError):
                    make = self._teacher_maker(model, image_size=size, own_image_size=side)
                    return make().grid(size), model
            return None, section

        side = objective.teacher_image_size
        if side == AUTO:
            side, as_it_is = 0, at(0)[0]
            given = as_it_is and objective.interpolation == "bilinear"
            if as_it_is != wanted and not given:
                side = teacher_side(
                    wanted,
                    lambda side: at(side)[0],
                    image_size=size,
                    own_size=own_image_size(section.model, architecture),
                )
        grid, teacher = at(side)
        interpolation = objective.interpolation
        if interpolation == AUTO:
            interpolation = "none" if grid in (wanted, None) else "bilinear"
        objective = replace(objective, teacher_image_size=side, interpolation=interpolation)
        return replace(run, teacher=teacher, objective=objective)

    def splits_models(self) -> bool:
        """Returns whether the teacher is sharded."""
        return self.run.teacher.placement != "replicated"

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns where the teacher's weights are held."""
        return {"teacher_placement": self.run.teacher.placement}

    # --- the models ---

    def make_teacher(self) -> Frozen:
        """Constructs the teacher with random weights."""
        run = self._settled
        return self._teacher_maker(
            run.teacher,
            image_size=run.data.image_size,
            own_image_size=run.objective.teacher_image_size,
        )()

    def _teacher_maker(
        self, section: FrozenModel, *, image_size: int, own_image_size: int
    ) -> Callable[[], Frozen]:
        return frozen_maker(
            section,
            image_size=image_size,
            own_image_size=own_image_size,
            residual_dtype=self.run.teacher.residual_dtype,
            before_norm=self.run.objective.layer == "before_norm",
        )

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the teacher; must run before the student's engine is built."""
        section = self.run.teacher
        weights = frozen_weights(section, self.weights, where=SOURCE)
        if section.source == RANDOM:
            log.warning(
                "teacher: RANDOM weights (--teacher.source random): there is nothing to learn"
            )
        student_type = "bfloat16" if bfloat16 else "float32"
        self._teacher = place(
            self.make_teacher,
            placement=section.placement,
            dtype=getattr(torch, student_type if section.dtype == "auto" else section.dtype),
            seed=self.run.runtime.seed + 1,
            node_size=node_size,
            persistence_threshold=persistence_threshold,
            weights=weights,
            whole_first=self.run.teacher_architecture().whole_first,
        )
        log.debug(
            "teacher: %s, %s, %.1f MB on this rank, hash %s",
            section.model,
            section.placement,
            self._teacher.held_bytes() / 1e6,
            self._teacher.fingerprint,
        )

    def make_task(self) -> Distillation:
        """Constructs student, projection and loss around the run's teacher.

        Raises: ConfigError: if the statistics in a file are of other targets.
        """
        task, path = self.task_around(self.teacher), self.run.objective.target_statistics
        if self._uses_statistics:
            stored = target_statistics.read(path).facts
            target_statistics.require_same(stored, self.target_facts(task), path)
        return task

    def target_facts(self, task: Distillation) -> Mapping[str, Any]:
        """Returns what decides the tokens that are learnt, besides the images.

        Args:
            task: The task around the run's teacher.
        """
        run = self._settled
        size = run.data.image_size
        return {
            "teacher_hash": self.teacher.fingerprint,
            "layer": run.objective.layer,
            "image_size": size,
            "teacher_image_size": run.objective.teacher_image_size,
            "interpolation": run.objective.interpolation,
            "grid": list(task.student.grid(size, size)),
            "prefix_tokens": task.student.num_prefix_tokens,
            "width": self.teacher.width,
        }

    def models_on_shapes(self) -> tuple[Distillation, tuple[nn.Module, ...]]:
        """Constructs the task around a teacher of its own."""
        teacher = self.make_teacher()
        return self.task_around(teacher), (teacher,)

    def task_around(self, teacher: Frozen | PlacedTeacher) -> Distillation:
        """Constructs student, projection and loss around a teacher."""
        objective = self._settled.objective
        doors.require_allowed(
            {
                f"objective.{name}": getattr(objective, name)
                for name in ("head", "loss", "normaliser")
            }
        )
        return Distillation(
            make_student(self.run.student, image_size=self.run.data.image_size),
            teacher,
            teacher.width,
            loss=objective.loss,
            normaliser=objective.normaliser,
            head=objective.head,
            beta=objective.beta,
            whitening_eps=objective.whitening_eps,
            target_statistics=objective.target_statistics,
            interpolation=objective.interpolation,
        )

    # --- training ---

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
            evaluations.append(self._knn(engine, micro_batch_size))
        return evaluations

    def _held_out_losses(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Evaluation:
        run = self.run
        images = {"held_out": self._held_out_images, "unseen_crops": samples}
        sets = distributed.together(
            lambda: [
                HeldOutViews(
                    name,
                    source,
                    views=run.eval.views,
                    settings=self.view_settings(),
                    micro_batch_size=micro_batch_size,
                    seed=run.runtime.seed,
                    skip_bad=name == "unseen_crops",
                )
                for name, source in images.items()
            ]
        )

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], Panel | None]:
            metrics: dict[str, float] = {}
            for views in sets:
                metrics |= views.measure(engine, between)
                if last:
                    constant = views.best_constant(engine, between)
                    metrics[f"{views.name}_best_constant"] = constant
            return metrics, sets[0].panel(engine) if step == 0 or last else None

        return Evaluation(measure, run.eval.every)

    def _knn(self, engine: Engine, micro_batch_size: int) -> Evaluation:
        run = self.run
        train_set, test_set = self._labelled_images

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], Panel | None]:
            folder = Path(run.run_dir()) / "features"
            found = {}
            splits = (("train", train_set), ("test", test_set))
            with evaluating(engine), activity.work("k-NN"):
                for name, images in activity.counted(splits, "features of train and test", "parts"):
                    (found[name],) = extract(
                        _student_of(engine),
                        IMAGENET,
                        images,
                        folder / name,
                        image_size=run.data.image_size,
                        batch_size=micro_batch_size,
                        workers=run.data.workers,
                        max_pixels=run.data.max_pixels,
                        between=between,
                    )
            predicted = knn.classify(
                found["train"],
                found["test"],
                num_classes=len(train_set.classes),
                between=between,
            )
            accuracy = found["test"].percent(predicted)
            distributed.barrier()
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            return {"test_knn": accuracy}, None

        return Evaluation(measure, run.eval.knn_every)

    def hooks(self) -> Sequence[Hook]:
        """Returns what writes the maps of some images, and the canary of the teacher."""
        every, size = self.run.runtime.canary_every, self.run.data.image_size
        if not every:
            return (FeaturePanel(),)
        return (
            FeaturePanel(),
            Canary(
                every,
                shard_of=self.teacher.shard_hash,
                map_of=lambda: self.teacher.map_of_fixed_images(size),
            ),
        )

    def evaluated(self, first: Mapping[str, float], last: Mapping[str, float]) -> Mapping[str, Any]:
        """Returns the newest numbers, and the held-out loss before training."""
        own = {name: value for name, value in last.items() if name != "held_out_best_constant"}
        named = {
            "held_out_loss_start": first.get("held_out_loss"),
            "loss_best_constant": last.get("held_out_best_constant"),
        }
        return {**super().evaluated({}, {}), **named, **own}

    # --- checkpoints, and what others take from them ---

    def facts(self) -> Mapping[str, Any]:
        """Returns the teacher's source and hash, and the hash of a file of statistics."""
        return {
            "teacher_source": self.run.teacher.source,
            "teacher_hash": self.teacher.fingerprint,
            **({"target_statistics": self._statistics_digest} if self._uses_statistics else {}),
        }

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that learned from another teacher, or by other statistics."""
        if self._uses_statistics and manifest.get("target_statistics") != self._statistics_digest:
            raise CheckpointError(
                f"{target_statistics.WHERE}: not the file that this run began with; got hash "
                f"{self._statistics_digest}, expected {manifest.get('target_statistics')}. Give "
                "that file, or --fresh."
            )
        if manifest.get("teacher_hash") != self.teacher.fingerprint:
            raise CheckpointError(
                "teacher.source: not the teacher that this run began with; got hash "
                f"{self.teacher.fingerprint}, expected {manifest.get('teacher_hash')} "
                f"({manifest.get('teacher_source')}). Give that file, or --fresh."
            )

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the projection if the library's files hold it.

        The whole task is checked, whatever part of it goes out; but a head of the user's own is
        trained and discarded.
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
        stream.check(reader, whole | projection)
        return projection if to == "fd" else {}

    def learned(self, manifest: Mapping[str, Any]) -> Learned:
        """Returns what the model card says of teacher, loss and crops."""
        teacher = self.run.teacher
        architecture = resolve(teacher.model, teacher.architecture)
        return learned(
            self.run.to_dict(),
            origin_of(teacher.source, teacher.model, architecture),
            teacher_hash=manifest.get("teacher_hash", "not recorded"),
        )

    @property
    def _uses_statistics(self) -> bool:
        return self.run.objective.normaliser in BY_STATISTICS

    @cached_property
    def _statistics_digest(self) -> str:
        return target_statistics.read(self.run.objective.target_statistics).digest

    @property
    def _projects(self) -> bool:
        return self.run.objective.head == "linear"

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the teacher."""
        run = self._settled
        return {"teacher": FrozenPart(run.teacher, run.objective.teacher_image_size)}

    def in_one_process(self) -> Run:
        """Returns the recipe with the teacher whole on its rank."""
        return replace(self.run, teacher=replace(self.run.teacher, placement="replicated"))

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


def _grid(whose: str, grid_of: Callable[[int, int], Grid], side: int) -> Grid:
    """The grid of a model's map.

    Raises: ShapeError: naming the model, if it takes no images of that side.
    """
    try:
        return grid_of(side, side)
    except ShapeError as error:
        raise ShapeError(f"{whose}: {error}") from None


def _student_of(engine: Engine) -> Callable[[Tensor], FeatureMap]:
    """Returns a function from pixels to the student's map, by a forward of the whole task.

    Only that gathers the student's shards. The teacher is not run: its map is replaced by zeros.
    """
    task = engine.task
    seen: list[FeatureMap] = []
    target: FeatureMap | None = None

    def forward(pixels: Tensor) -> FeatureMap:
        nonlocal target
        if target is None:
            images = torch.zeros_like(pixels[:1], dtype=torch.uint8)
            target = task.prepare(images, None, None)["target"]
        tokens = torch.zeros_like(target.tokens).expand(len(pixels), -1, -1)
        handle = task.student.register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            engine.deepspeed(pixels=pixels, keep=None, target=target._replace(tokens=tokens))
        finally:
            handle.remove()
        return seen.pop()

    return forward
