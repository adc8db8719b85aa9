"""The views whose maps a cache holds, on the way into it and out of it; runs in the loader.

Besides each map stands a thumbnail of the view that it was computed from, as the teacher saw it. A
run compares it with the view that it made itself: an image that was replaced under its old name,
or a view that is cut otherwise than it was, is found before anything is learnt from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fd_large.data.source import ImageSource
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.data.views import FixedViews, ViewSettings, jittered_view
from fd_large.errors import CacheError, DataError
from fd_large.recipes.fields import require
from fd_large.tasks.distillation.cached.files import SIDE, CacheReader
from fd_large.tasks.distillation.section import MAP, NamedTeacher, field_of

# Grey levels: other processors may resize a view to pixels that differ by one.
TOLERANCE = 2


def set_of(view: int) -> str:
    """Returns the name of the set of records of a view number."""
    return f"view_{view}"


def _view_of(name: str) -> int:
    return int(name.removeprefix("view_"))


def thumbnail(view: Tensor) -> Tensor:
    """Returns what tells a view (3, S, S) uint8 from others, its 8 x 8 means in grey.

    Returns: (64,) uint8.
    """
    return F.adaptive_avg_pool2d(view.float().mean(0, keepdim=True), SIDE).round().byte().flatten()


class Place(NamedTuple):
    """Records that are made in one forward.

    Attributes:
        name: Their set.
        records: The images' numbers; none: the rank takes part in the forward all the same.
    """

    name: str
    records: Sequence[int]


class ToStore(NamedTuple):
    """The views of a place.

    Attributes:
        images: (batch_size, 3, S, S) uint8; black where there is no image, or none that can be
            used.
        thumbnails: (batch_size, 64) uint8.
        bad: For each record why its image cannot be used; empty: it can.
    """

    images: Tensor
    thumbnails: Tensor
    bad: tuple[str, ...]


def training_view(
    source: ImageSource, settings: ViewSettings, fixed: FixedViews, name: str, index: int
) -> Tensor:
    """Returns a view of image `index`, (3, S, S) uint8: that of the set `name`.

    Raises: DataError: if the image cannot be used.
    """
    return jittered_view(source, index, fixed.draws(_view_of(name), index), settings)


@dataclass(frozen=True)
class ViewsToStore(Dataset):
    """Places to views, always as many, so that a map does not depend on how many were left.

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


@dataclass(frozen=True)
class StoredMaps:
    """Reads the maps of a set of views: a `Beside` of the loader.

    Attributes:
        readers: The caches, by the teacher's name.
        name: The set.
        name_of: Returns the name of the image of a record.
    """

    readers: Mapping[str, CacheReader]
    name: str
    name_of: Callable[[int], str]

    def of(self, index: int, view: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the stored map of an image by the teacher's name: see `CachedTeacher.of_stored`.

        Raises:
            DataError: if the image could not be used when the cache was written.
            CacheError: if the cache is damaged, or holds the map of another view.
        """
        maps = {}
        for name, reader in self.readers.items():
            record = reader.read(self.name, index)
            if record is None:
                raise DataError(
                    f"{self.name_of(index)}: no map in {reader.folder}; got an image that could "
                    "not be used when that was written, expected one that can. Write the cache "
                    "again."
                )
            off = (record.thumbnail.int() - thumbnail(view).int()).abs().max().item()
            if off > TOLERANCE:
                error = CacheError(
                    f"{reader.folder}: the map of another view; {self.name_of(index)}, "
                    f"{self.name}, differs by {off} grey levels from what the teacher saw, "
                    f"expected at most {TOLERANCE}. The image has changed since the cache was "
                    "written: restore it, or write the cache again."
                )
                error.rank_local = True
                raise error
            maps[name] = (record.map.values.view(torch.uint8), record.map.scales)
        return maps

    def blank(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns zeros in the shapes of stored maps."""
        return {name: blank(reader) for name, reader in self.readers.items()}


def blank(reader: CacheReader) -> tuple[Tensor, Tensor]:
    """Returns the map of a place where no image can be used: zeros."""
    (dtype, values), (_, scales) = (reader.header.rows(1)[name] for name in ("values", "scales"))
    bytes_of_values = (values[1], values[2] * dtype.itemsize)
    return torch.zeros(bytes_of_values, dtype=torch.uint8), torch.zeros(scales[1:])


def check_fixed_views(views: int, *, image_mixup: bool) -> None:
    """Refuses mixed images beside views that come again: a mixed one does not."""
    require(
        not image_mixup,
        "data.image_mixup: views that come again are not mixed, nor are stored maps",
        f"{image_mixup} with {views} views",
        "False",
        "Leave it out, or set --task.distillation.views 0",
    )


def check_storable(image_sizes: Sequence[int], mosaics: Mapping[str, int]) -> None:
    """Refuses stored maps of images of several sizes, or of several at once.

    Args:
        image_sizes: Those that a run draws from; empty: its images have one size.
        mosaics: Images along each side of a teacher's input, by its name; 0 for a single image.
    """
    require(
        not image_sizes,
        "data.image_sizes: stored maps are of views of one size",
        " ".join(map(str, image_sizes)),
        "none",
        "Leave it out, or store no maps",
    )
    for name, mosaic in mosaics.items():
        require(
            not mosaic,
            f"teachers.{name}.mosaic: a map out of a mosaic is not the map of one view, as stored "
            "maps are",
            mosaic,
            "0",
            "Leave it out, or store no maps",
        )


def check_stored_summary(name: str, entry: NamedTeacher, *, gives_summary: bool) -> None:
    """Refuses stored maps of a teacher whose summary is learnt and is not in its map.

    Args:
        name: The teacher's name; "" for an only one.
        entry: What the recipe says of it.
        gives_summary: Whether the model gives a summary besides its map.
    """
    require(
        not (entry.embedding_width or gives_summary),
        f"{field_of(name, 'targets')}: a stored map does not hold this summary",
        " ".join(entry.targets),
        MAP,
        "Learn the map alone, or store no maps",
    )
