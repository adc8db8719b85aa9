"""Finds out whether compared models were trained on the images that a sweep holds out.

A sweep holds images out of its own trials. But a student that was distilled on the same folder,
or a teacher that an earlier run trained on the folder, has seen these images. Accuracies of such
models on held-out images are less reliable than those of models that never saw the images. With
`--data.root FOLDER/train --data.val_fraction 0.1`, distillation holds out the same images as a
sweep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fd_large.errors import DataError
from fd_large.evaluation.lineage import Training, trainings_of

if TYPE_CHECKING:
    from fd_large.data.folder import ImageFolder


class Seen(NamedTuple):
    """Trainings behind a model's weights that may have used held-out images.

    Attributes:
        by: Trainings that used some of the held-out images.
        not_known: Trainings and weights without a record of whether they used these images.
    """

    by: tuple[str, ...] = ()
    not_known: tuple[str, ...] = ()


NOTHING_SEEN = Seen()


def seen_by(source: str, images: ImageFolder, fraction: float) -> Seen:
    """Returns which of the trainings that led to a model used held-out images.

    The datasets of runs on this machine are compared by their paths. An export records no paths,
    so its datasets are compared by the hash of the images' names.

    Args:
        source: The model's weights, as `teacher.source` takes them.
        images: The images of a folder, of which a part is held out.
        fraction: Fraction of the images that is held out, chosen by a hash of their names.
    """
    # Several trainings may have the same name, since an export records no folders.
    answers = [
        (str(training), _saw(training, images, fraction)) for training in trainings_of(source)
    ]
    by = dict.fromkeys(name for name, saw in answers if saw)
    not_known = dict.fromkeys(name for name, saw in answers if saw is None and name not in by)
    return Seen(tuple(by), tuple(not_known))


def _saw(training: Training, images: ImageFolder, fraction: float) -> bool | None:
    """Whether a training used held-out images, or None if that is unknown.

    Args:
        training: The training.
        images: The images of a folder, of which a part is held out.
        fraction: Fraction of the images that is held out, chosen by a hash of their names.
    """
    if training.is_here:
        part, roots = Path(images.root).resolve(), filter(None, training.images)
        return any(
            training.val_fraction < fraction
            if learnt == part
            else learnt in part.parents or part in learnt.parents
            for learnt in (Path(root).resolve() for root in roots)
        )
    if training.fingerprint in _listings(images, training.val_fraction):
        return training.val_fraction < fraction
    return None


def _listings(images: ImageFolder, val_fraction: float) -> list[str]:
    """Returns a list with one hash, of the names of the images that a run trains on.

    The list is empty if `val_fraction` is above 0, but would hold out no image, or all images.

    Args:
        images: All images of the run's folder.
        val_fraction: Fraction of the images that the run holds out.
    """
    from fd_large.data.val_fraction import Part, places_of

    if not val_fraction:
        return [images.fingerprint]
    try:
        places = places_of(images, "train", val_fraction, where="--sweep")
    except DataError:  # The fraction holds out none of the images, or all.
        return []
    return [Part(images, places).fingerprint]
