"""The job of a linear probe: a frozen model, labelled images, accuracy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.data.views import ViewSettings
from fd_large.engine.job import StoredStudent
from fd_large.engine.student import make_student, student_weights
from fd_large.engine.zero import partition
from fd_large.engine.zero.fingerprint import fingerprint
from fd_large.errors import CheckpointError, ConfigError
from fd_large.ranks import distributed
from fd_large.runtime.hooks import Hook, Setting
from fd_large.tasks.classification.job import ClassificationJob
from fd_large.tasks.classification.views import LabelledViews
from fd_large.tasks.linear.section import KIND
from fd_large.tasks.linear.task import Frozen, FrozenFeature, LinearProbing, probe_batch
from fd_large.tasks.linear.views import GroupedBatches

log = logging.getLogger(__name__)


class LinearProbeJob(ClassificationJob):
    """A linear layer learns the labels from features of `student.init`, which stays as it is."""

    ignored_fields = KIND.ignored_fields

    _frozen: Frozen | None = None
    _hash = ""

    def check(self) -> None:
        """Checks the groups of the batch norm besides."""
        size, group = self.run.batch.global_batch_size, self.run.task.linear.norm_batch
        if size % self._group:
            raise ConfigError(
                f"task.linear.norm_batch: does not divide batch.global_batch_size = {size}; got "
                f"{group}, expected a divisor. Change one of the two."
            )
        super().check()
        self._frozen_weights()  # Refuses wrong ones before the frozen model is built.

    @property
    def _group(self) -> int:
        return min(self.run.task.linear.norm_batch, self.run.batch.global_batch_size)

    def view_settings(self) -> ViewSettings:
        """Returns how the recipe makes an image a view: boxes that do not fit are cut."""
        return replace(super().view_settings(), cuts_boxes=True)

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the frozen model, whole on every rank."""
        tested = partition.build(
            self._feature, {}, partitioned=False, seed=self.run.runtime.seed + 1
        )
        weights = self._frozen_weights()
        if weights is not None:
            partition.load_weights(tested.model, weights, where="--student.init")
        self._hash = fingerprint(tested.model)
        tested.to(distributed.device())
        learning = tested
        if bfloat16:
            learning = copy.deepcopy(tested)
            partition.to_bfloat16(learning)
        self._frozen = Frozen(learning, tested)

    def _frozen_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        left_out = super().stored_student().absent
        student, size = self.run.student, self.run.data.image_size
        return student_weights(student, self.weights, image_size=size, without=left_out)

    def _feature(self) -> FrozenFeature:
        model = make_student(self.run.student, image_size=self.run.data.image_size)
        return FrozenFeature(model, self.statistics())

    def make_task(self) -> LinearProbing:
        """Constructs norm and layer around the frozen model; before `build` around another."""
        frozen = self._frozen
        if frozen is None:
            feature = self._feature()
            frozen = Frozen(feature, feature)
        return LinearProbing(frozen, self.num_classes, norm_batch=self._group)

    def models_on_shapes(self) -> tuple[LinearProbing, tuple[nn.Module, ...]]:
        """Constructs the task around a frozen model of its own."""
        built, self._frozen = self._frozen, None
        task = cast(LinearProbing, super().models_on_shapes()[0])
        self._frozen = built
        return task, (task.models()["frozen."],)

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Returns None: what is trained starts from random weights."""
        return None

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields random crops and flips, in whole groups."""
        run = self.run
        views = LabelledViews(
            cast(LabelledImages, samples), self.view_settings(), run.runtime.seed, portion.epoch
        )
        return iter(
            build_loader(
                GroupedBatches(views, self._group),
                len(samples),
                portion,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes grey images, in whole groups."""
        return probe_batch(size, self.run.data.image_size, norm_batch=self._group)

    def images_together(self) -> int:
        """Returns the images of a group."""
        return self._group

    def hooks(self) -> Sequence[Hook]:
        """Returns what warns of micro batches that are parts of groups."""
        return (_GroupWarning(self._group),)

    def facts(self) -> Mapping[str, Any]:
        """Returns the source and the hash of the frozen model."""
        return {"frozen_source": self.run.student.init, "frozen_hash": self._hash}

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint whose layer belongs to another model."""
        if manifest.get("frozen_hash") != self._hash:
            raise CheckpointError(
                "student.init: not the model that this probe began with; got hash "
                f"{self._hash}, expected {manifest.get('frozen_hash')} "
                f"({manifest.get('frozen_source')}). Give that file, or --fresh."
            )

    def stored_student(self) -> StoredStudent:
        """Refuses: only the layer is stored.

        Raises: CheckpointError: always.
        """
        raise CheckpointError(
            f"{self.run.run_dir()}: a linear probe trains no model; got a run that stores a layer "
            f"alone, expected the model itself. Name {self.run.student.init or 'its weights'}."
        )


class _GroupWarning(Hook):
    """Says at the start that images are loaded again, once the micro batch is known."""

    def __init__(self, group: int) -> None:
        self._group = group

    def on_start(self, setting: Setting) -> None:
        size = setting.micro_batch_size
        if size % self._group and distributed.is_main():
            log.warning(
                "batch.micro_batch_size: statistics of the batch norm want whole groups of %d "
                "images (task.linear.norm_batch); got %d, so that each micro batch loads and "
                "computes at least %d. Set a multiple of %d, or use fewer ranks.",
                self._group,
                size,
                -(-size // self._group) * self._group,
                self._group,
            )
