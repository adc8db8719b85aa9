"""Maps of the views that held-out losses are measured on, in a folder of their own in a cache.

CACHE/held_out is a cache like that of the training views, with two sets. So it can be written
later, and what a run is evaluated on says nothing about the maps that it learns from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.data.views import ViewSettings
from fd_large.errors import CacheError
from fd_large.files import kind_of
from fd_large.tasks.distillation.cached.files import HEADER, CacheReader, CacheWriter, Header
from fd_large.tasks.distillation.cached.teacher import (
    TEACHER_FACTS,
    header_of,
    require_same_views,
)
from fd_large.tasks.distillation.cached.views import ViewsToStore
from fd_large.tasks.distillation.held_out import Crops
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.teacher import PlacedTeacher

FOLDER = "held_out"


def facts_of(crops: Mapping[str, Crops], settings: ViewSettings) -> dict[str, Any]:
    """Returns what decides the views, by the fields that say it.

    Args:
        crops: Cuts the views of each set.
        settings: How an image becomes a view.
    """
    first = next(iter(crops.values()))
    return {
        "data.image_size": settings.image_size,
        "data.min_crop_scale": settings.min_crop_scale,
        "interpolation": settings.interpolation,
        "eval.views": first.views,
        "seed of the views": first.seed,
        **{f"hash of the list of images of {n}": c.source.fingerprint for n, c in crops.items()},
    }


def writer_of(
    folder: Path,
    teacher: PlacedTeacher,
    entry: NamedTeacher,
    crops: Mapping[str, Crops],
    settings: ViewSettings,
    *,
    precision: str,
) -> CacheWriter:
    """Returns what writes the maps of a teacher; a collective.

    Args:
        folder: The cache of its training views.
        teacher, entry, precision: See `header_of`.
        crops, settings: See `facts_of`.
    """
    facts = facts_of(crops, settings)
    sets = {name: len(cut) for name, cut in crops.items()}
    header = header_of(teacher, entry, facts, precision=precision, sets=sets)
    return CacheWriter(folder / FOLDER, header)


def views_of(crops: Mapping[str, Crops], settings: ViewSettings, batch_size: int) -> ViewsToStore:
    """Returns what loads the views on the way into a cache."""
    return ViewsToStore(partial(_cut, crops), settings.image_size, batch_size)


def _cut(crops: Mapping[str, Crops], name: str, view: int) -> Tensor:
    return crops[name](view)


def reader_of(folder: Path, training: Header, facts: Mapping[str, Any]) -> CacheReader:
    """Returns what reads the maps of the views that a run is evaluated on.

    Args:
        folder: The cache of the training views.
        training: Its header.
        facts: The `facts_of` the run.

    Raises: CacheError: if there are none, or they are of other views or another teacher.
    """
    own = folder / FOLDER
    if not kind_of(own / HEADER):
        raise CacheError(
            f"eval.root: {folder} has no maps of held-out images; got no {FOLDER}/{HEADER}, "
            "expected those of this eval.root. Give the command that wrote the cache once more, "
            "with --eval.root: it adds them. Or set --eval.root '' and go without."
        )
    header = Header.read(own, where="eval.root")
    of_teacher = {name: training.facts[name] for name in TEACHER_FACTS}
    require_same_views(header, {**of_teacher, **facts}, where="eval.root")
    reader = CacheReader(own, header)
    reader.check_whole(where="eval.root")
    return reader
