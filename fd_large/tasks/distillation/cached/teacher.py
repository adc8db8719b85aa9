"""What stands in a teacher's place where its maps come from a cache: no model at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.source import ImageSource
from fd_large.data.views import FixedViews, ViewSettings
from fd_large.errors import CacheError, ConfigError
from fd_large.ranks import distributed
from fd_large.recipes.fields import from_plain, plain
from fd_large.recipes.sections import AUTO, Batch
from fd_large.tasks.distillation.cached.files import (
    CacheReader,
    Header,
    differences,
    records_per_shard,
)
from fd_large.tasks.distillation.cached.precision import PRECISIONS, Stored, decode
from fd_large.tasks.distillation.cached.views import set_of
from fd_large.tasks.distillation.section import NamedTeacher, Teacher, cached_folder
from fd_large.tasks.distillation.teacher import PlacedTeacher

BATCH_SIZE = 32
"""Images of a forward where the recipe leaves the micro-batch to a trial step."""
TEACHER_FACTS = ("teacher_hash", "layer", "teacher_image_size", "statistics", "stored")
"""The facts of a header that are the teacher's."""


class CachedTeacher:
    """Gives back the maps that a cache holds.

    Args:
        reader: The cache.
        where: The field that names it, for messages.

    Attributes:
        reader: As given.
        width: Number of channels of the map.
        fingerprint: Hash of the weights of the teacher that made the maps.
    """

    def __init__(self, reader: CacheReader, *, where: str) -> None:
        self.reader, self._where = reader, where
        self.width = reader.header.width
        self.fingerprint: str = reader.header.facts["teacher_hash"]

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns rows and columns of the map, whatever the side of the student's images."""
        return self.reader.header.grid

    def of_stored(self, images: Tensor, stored: Sequence[Tensor]) -> FeatureMap:
        """Returns the map of a batch.

        Args:
            images: (B, 3, S, S) uint8, which are of no use here.
            stored: The loader's: values (B, N, bytes of C values) uint8, and scales (B, N, 2).
        """
        header, (values, scales) = self.reader.header, stored
        kept = Stored(values.view(PRECISIONS[header.precision]), scales)
        tokens = decode(kept, getattr(torch, header.dtype))
        return FeatureMap(tokens, header.grid, header.prefix_tokens)

    def __call__(self, images: Tensor) -> NoReturn:
        """Refuses: there is no model that other images could be shown to.

        Raises: ConfigError: always.
        """
        raise ConfigError(
            f"{self._where}: cached targets are of training views alone; got {len(images)} other "
            "images, expected none. Name the teacher itself, whose maps were stored: "
            f"{self.reader.header.teacher['source']}."
        )


class FromStored:
    """Around the teachers (task.py): what a loader put beside the images becomes a teacher's map.

    A `CachedTeacher` reads it; a `Recorder` reads it, or shows the images to its model and writes.

    Args:
        teachers: The seam that it stands around.
    """

    def __init__(self, teachers: Any) -> None:
        self._teachers, self.by_name = teachers, teachers.by_name

    def __call__(
        self, images: Tensor, given: Mapping[str, Any], training: bool
    ) -> Mapping[str, Any]:
        """Returns the maps by name, beside what else was given."""
        maps = {
            name: teacher.of_stored(images, given[name])
            for name, teacher in self.by_name.items()
            if name in given and not isinstance(given[name], FeatureMap)
        }
        return self._teachers(images, {**given, **maps}, training)


def settled(entry: NamedTeacher, *, where: str) -> NamedTeacher:
    """Returns a teacher's entry as its cache says it is: the model that made the maps.

    Raises: CacheError: if there is no cache, or the recipe asks for maps of another kind.
    """
    header = Header.read(Path(cached_folder(entry.source)), where=where)
    made_by = from_plain(Teacher, dict(header.teacher), "teacher.")
    stored = {
        "model": made_by.model,
        "architecture": made_by.architecture,
        "statistics": made_by.statistics,
        "residual_dtype": made_by.residual_dtype,
        **{name: header.facts[name] for name in ("layer", "teacher_image_size")},
    }
    usual = NamedTeacher()
    # What was left to the weights, or to the teacher's grid, is the cache's to say.
    free = {name: (getattr(usual, name), AUTO) for name in stored if name != "layer"}
    free["layer"] = ()
    own = {name: getattr(entry, name) for name in stored if getattr(entry, name) not in free[name]}
    if other := differences({name: stored[name] for name in own}, own):
        raise CacheError(
            f"{where}: maps of another kind than the recipe's; got {other}, expected the same. "
            "Leave these fields out, or write a cache for them."
        )
    return replace(entry, **stored)


def view_facts(settings: ViewSettings, fixed: FixedViews, samples: ImageSource) -> dict[str, Any]:
    """Returns what decides the views of a dataset, by the fields that say it.

    Args:
        settings: How an image becomes a view.
        fixed: Draws the views.
        samples: The images.
    """
    return {
        "data.image_size": settings.image_size,
        "data.min_crop_scale": settings.min_crop_scale,
        "data.color_jitter": settings.color_jitter,
        "data.grayscale_probability": settings.grayscale_probability,
        "interpolation": settings.interpolation,
        "task.distillation.views": fixed.count,
        "task.distillation.view_seed": fixed.seed,
        "images": len(samples),
        "hash of the list of images": samples.fingerprint,
    }


def teacher_facts(teacher: PlacedTeacher, entry: NamedTeacher) -> dict[str, Any]:
    """Returns what decides the map of a view: a value for each of `TEACHER_FACTS`."""
    values = (
        teacher.fingerprint,
        entry.layer,
        entry.teacher_image_size,
        [list(part) for part in teacher.module.statistics],
        "the teacher's own map, before interpolation and normaliser",
    )
    return dict(zip(TEACHER_FACTS, values, strict=True))


def header_for(given: FeatureMap, precision: str) -> Header:
    """Returns a header of maps like one (1, N, C), of no images yet."""
    header = Header(
        facts={},
        teacher={},
        precision=precision,
        tokens=given.tokens.shape[1],
        width=given.tokens.shape[2],
        grid=given.grid,
        prefix_tokens=given.num_prefix_tokens,
        dtype=str(given.tokens.dtype).removeprefix("torch."),
        sets={},
        records_per_shard=1,
    )
    return replace(header, records_per_shard=records_per_shard(header.record_bytes))


def header_of(
    teacher: PlacedTeacher,
    entry: NamedTeacher,
    views: Mapping[str, Any],
    *,
    precision: str,
    sets: Mapping[str, int] | None = None,
) -> Header:
    """Returns the header of a cache of a teacher's maps; a collective.

    Args:
        teacher: The teacher; it is shown a grey image.
        entry: What the recipe says of it.
        views: The facts of the views.
        precision: How the maps are stored.
        sets: Records of each set; None: the training views of these `view_facts`.
    """
    if sets is None:
        sets = {set_of(view): views["images"] for view in range(views["task.distillation.views"])}
    side = views["data.image_size"]
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=distributed.device())
    return replace(
        header_for(teacher(grey), precision),
        facts={**teacher_facts(teacher, entry), **views},
        teacher=plain(asdict(entry.parted()[0])),
        sets=sets,
    )


def require_same_views(header: Header, views: Mapping[str, Any], *, where: str) -> None:
    """Refuses a cache of other views than those of a run.

    Raises: CacheError: naming what differs.
    """
    stored = {name: header.facts[name] for name in views}
    if other := differences(stored, views):
        raise CacheError(
            f"{where}: cached targets of other views than this run's; got {other}, expected the "
            "same. Set these fields as they were, or write a cache for this run: fd-large cache."
        )


def batch_size(batch: Batch) -> int:
    """Returns the images of a forward of a teacher alone: as in training, if the recipe says it."""
    return BATCH_SIZE if batch.micro_batch_size == AUTO else batch.micro_batch_size
