"""Views for writing a cache."""

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
"""Images of a forward where the recipe leaves the micro-batch to a trial step."""


def set_of(view: int) -> str:
    """Returns the name of the set of records of a view number."""
    return f"view_{view}"


def _view_of(name: str) -> int:
    return int(name.removeprefix("view_"))


def thumbnail(view: Tensor) -> Tensor:
    """Returns the thumbnail of a view (3, S, S) uint8: its 8 x 8 means in grey.

    Returns: (64,) uint8.
    """
    return F.adaptive_avg_pool2d(view.float().mean(0, keepdim=True), SIDE).round().byte().flatten()


class Place(NamedTuple):
    """Records of one set that a single forward computes.

    Attributes:
        name: Name of the set of views.
        records: Indices of the images; if empty, the rank still takes part in the forward.
    """

    name: str
    records: Sequence[int]


class ToStore(NamedTuple):
    """The views of a place.

    Attributes:
        images: (batch_size, 3, S, S) uint8; black where there is no usable image.
        thumbnails: (batch_size, 64) uint8.
        bad: For each record, the problem of its image; empty for usable images.
    """

    images: Tensor
    thumbnails: Tensor
    bad: tuple[str, ...]


def training_view(
    source: ImageSource, settings: ViewSettings, fixed: FixedViews, name: str, index: int
) -> Tensor:
    """Returns the view of image `index` in the set `name`, (3, S, S) uint8.

    Raises: DataError: if the image cannot be used.
    """
    return jittered_view(source, index, fixed.draws(_view_of(name), index), settings)


@dataclass(frozen=True)
class ViewsToStore(Dataset):
    """Loads views in batches of a fixed size, so that the last batch is computed like the others.

    Attributes:
        cut: Makes the view of a set and a record, (3, image_size, image_size) uint8; DataError if
            its image cannot be used.
        image_size: Side of a view, in pixels.
        batch_size: Images of a forward.
    """

    cut: Callable[[str, int], Tensor]
    image_size: int
    batch_size: int

    def __getitem__(self, place: Place) -> ToStore:
        """Loads the views of a place."""
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
    """Returns the facts that decide the views of a dataset, by the recipe's field or a description.

    Args:
        settings: Settings of the views.
        fixed: The source of recurring views.
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
    """Returns the batch size of a teacher's forward: the recipe's micro batch, or a default."""
    return BATCH_SIZE if micro_batch_size == AUTO else micro_batch_size


def check_fixed_views(views: int, *, image_mixup: bool) -> None:
    """Refuses mixed images together with recurring views, since mixtures do not recur."""
    require(
        not image_mixup,
        "data.image_mixup: views that come again are not mixed, nor are stored maps",
        f"{image_mixup} with {views} views",
        "False",
        "Leave it out, or set --task.distillation.views 0",
    )


def check_stored_summary(
    name: str, entry: NamedTeacher, gives_summary: Callable[[str], bool]
) -> None:
    """Refuses stored maps if the student learns a summary that the teacher's map lacks.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        gives_summary: Whether the teacher's model returns a summary besides its map.
    """
    require(
        not (entry.embedding_width or gives_summary(name)),
        f"{field_of(name, 'targets')}: a stored map does not hold this summary",
        " ".join(entry.targets),
        MAP,
        "Learn the map alone, or store no maps",
    )
