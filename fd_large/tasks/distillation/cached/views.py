"""Loads the views whose maps are written to a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fd_large.data.source import ImageSource
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.data.views import FixedViews, ViewSettings, jittered_view
from fd_large.errors import DataError
from fd_large.recipes.fields import require
from fd_large.recipes.sections import AUTO
from fd_large.tasks.distillation.cached.files import SIDE
from fd_large.tasks.distillation.section import MAP, NamedTeacher, field_of

BATCH_SIZE = 32
"""Number of images of a teacher's forward if the recipe's micro-batch size is "auto"."""


def set_of(view: int) -> str:
    """Returns the name of the set of records that stores the maps of a training view.

    Args:
        view: Number of the view.
    """
    return f"view_{view}"


def _view_of(name: str) -> int:
    """Returns the number of the view whose maps the set `name` stores; the inverse of `set_of`."""
    return int(name.removeprefix("view_"))


def thumbnail(view: Tensor) -> Tensor:
    """Returns the thumbnail of a view, (64,) uint8: the means of 8 x 8 regions in grey.

    Args:
        view: (3, S, S) uint8.
    """
    return F.adaptive_avg_pool2d(view.float().mean(0, keepdim=True), SIDE).round().byte().flatten()


class Place(NamedTuple):
    """The records of a set whose maps a single forward computes.

    Attributes:
        name: Name of the set.
        records: Numbers of the records. If there are none, the rank still runs the forward, on
            black images.
    """

    name: str
    records: Sequence[int]


class ToStore(NamedTuple):
    """The views of the records of a `Place`.

    Attributes:
        images: (batch_size, 3, S, S) uint8. A view is black if its image cannot be used; rows after
            the last record are black too.
        thumbnails: (batch_size, 64) uint8, the thumbnails of `images`.
        bad: For each record, why its image cannot be used; "" for a usable image.
    """

    images: Tensor
    thumbnails: Tensor
    bad: tuple[str, ...]


def training_view(
    source: ImageSource, settings: ViewSettings, fixed: FixedViews, name: str, index: int
) -> Tensor:
    """Returns a view of an image that later epochs repeat, (3, S, S) uint8.

    Args:
        source: The images.
        settings: Settings of the views.
        fixed: Generator of the views.
        name: Name of the set of records, which gives the number of the view (`set_of`).
        index: Index of the image.

    Raises: DataError: if the image cannot be used.
    """
    return jittered_view(source, index, fixed.draws(_view_of(name), index), settings)


@dataclass(frozen=True)
class ViewsToStore(Dataset):
    """Dataset of the views for each forward, in batches that all have the same size.

    A batch with fewer records is filled up with black images.

    Attributes:
        cut: Returns a record's view, (3, image_size, image_size) uint8, given the name of the
            record's set and the number of the record; raises DataError if the image cannot be used.
        image_size: Side of a view, in pixels.
        batch_size: Number of images of a forward.
    """

    cut: Callable[[str, int], Tensor]
    image_size: int
    batch_size: int

    def __getitem__(self, place: Place) -> ToStore:
        """Loads the views of the records that `place` names."""
        images = torch.zeros(self.batch_size, 3, *[self.image_size] * 2, dtype=torch.uint8)
        bad = []
        with suppress_stderr():
            for row, index in enumerate(place.records):
                try:
                    images[row] = self.cut(place.name, index)
                    bad.append("")
                except DataError as error:
                    bad.append(str(error))
        return ToStore(images, torch.stack([thumbnail(image) for image in images]), tuple(bad))


def view_facts(settings: ViewSettings, fixed: FixedViews, samples: ImageSource) -> dict[str, Any]:
    """Returns the settings that decide the training views, as {name: value}.

    A name is a field of the recipe, or words such as "hash of the list of images".

    Args:
        settings: Settings of the views.
        fixed: Generator of the views, which later epochs repeat.
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


def batch_size(micro_batch_size: int | Literal["auto"]) -> int:
    """Returns the batch size of a teacher's forward when maps are written.

    Args:
        micro_batch_size: The recipe's micro-batch size, which is used unless it is "auto".
    """
    return BATCH_SIZE if micro_batch_size == AUTO else micro_batch_size


def check_fixed_views(views: int, *, image_mixup: bool) -> None:
    """Raises ConfigError if images are mixed in a run that repeats views.

    Mixtures of images are not repeated.

    Args:
        views: Number of views of each image that later epochs repeat.
        image_mixup: Whether images are mixed.
    """
    require(
        not image_mixup,
        "data.image_mixup: recurring views and stored maps cannot be mixed",
        f"{image_mixup} with {views} views",
        "False",
        "Leave out data.image_mixup, or set --task.distillation.views 0",
    )


def check_stored_summary(
    name: str, entry: NamedTeacher, gives_summary: Callable[[str], bool]
) -> None:
    """Raises ConfigError if a teacher's summary is not contained in the teacher's stored maps.

    This function is called for teachers whose summary the student learns. The summary is missing
    in stored maps if it is an embedding, or if the teacher's model returns it besides its map.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        gives_summary: Whether the model of the teacher with a given name returns a summary
            besides its map.
    """
    require(
        not (entry.embedding_width or gives_summary(name)),
        f"{field_of(name, 'targets')}: stored maps do not contain this summary",
        " ".join(entry.targets),
        MAP,
        "Learn the map alone, or store no maps",
    )
