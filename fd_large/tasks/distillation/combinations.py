"""Which settings of a distillation do not go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from fd_large.recipes.fields import require
from fd_large.tasks.distillation.section import MAP, NamedTeacher, field_of


def check_stream(placements: Collection[str], *, stored_maps: bool) -> None:
    """Refuses a stream of the teachers' own where they are gathered, or stored maps are read.

    Gathers of teacher and student would wait for one another in the order of their calls.

    Args:
        placements: Those of the teachers.
        stored_maps: Whether maps are read or written.
    """
    unfit = {*placements, *(["stored maps"] if stored_maps else [])} - {"replicated"}
    require(
        not unfit,
        "task.distillation.teacher_stream: only for teachers that are whole on each rank",
        ", ".join(sorted(unfit)),
        "replicated ones",
        "Leave it out, or set the teacher's placement to replicated",
    )


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


def check_mosaics_full(images: int, micro_batch_size: int | str) -> None:
    """Refuses micro-batches that mosaics do not fill.

    The map of an image depends on those beside it: these must not change with the ranks.

    Args:
        images: The number of images of which all mosaics are full.
        micro_batch_size: Images of a rank; "auto" may be any number.
    """
    require(
        images == 1 or (not isinstance(micro_batch_size, str) and micro_batch_size % images == 0),
        "batch.micro_batch_size: mosaics that are not full",
        f"{micro_batch_size} images with mosaics of {images}",
        f"a multiple of {images}",
        f"Set --batch.micro_batch_size {images}",
    )
