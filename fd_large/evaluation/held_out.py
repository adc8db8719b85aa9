"""Checks whether compared models were trained on the held-out images by which a sweep chooses.

A sweep holds images out of its own trials. But a student that was distilled on the same folder
has seen them, and so has a teacher that an earlier run trained on it. Their accuracy on these
images is less reliable than that of a model that never saw them. With `--data.root FOLDER/train
--data.val_fraction 0.1`, distillation holds out the same images as a sweep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fd_large.errors import DataError
from fd_large.evaluation.lineage import Training, trainings_of

if TYPE_CHECKING:
    from fd_large.data.folder import ImageFolder


class Seen(NamedTuple):
    """Facts about held-out images and the weights of a model.

    Attributes:
        by: Trainings that led to the model, and used some of these images.
        not_known: Trainings and weights for which no record says whether they used these images.
    """

    by: tuple[str, ...] = ()
    not_known: tuple[str, ...] = ()


NOTHING_SEEN = Seen()


def seen_by(source: str, images: ImageFolder, fraction: float) -> Seen:
    """Returns which of the trainings that led to a model used held-out images.

    Datasets of runs are compared by their paths. Exports record no paths: their datasets are
    compared by the listing of the files' names.

    Args:
        source: The model's weights, as `teacher.source` takes them.
        images: The folder's images, of which a part is held out.
        fraction: Fraction of the images that a hash of their names holds out.
    """
    # Several trainings may have the same name, since an export records no folders.
    answers = [
        (str(training), _saw(training, images, fraction)) for training in trainings_of(source)
    ]
    by = dict.fromkeys(name for name, saw in answers if saw)
    not_known = dict.fromkeys(name for name, saw in answers if saw is None and name not in by)
    return Seen(tuple(by), tuple(not_known))


def _saw(training: Training, images: ImageFolder, fraction: float) -> bool | None:
    """Whether a training used held-out images, or None if no record says so."""
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
    """Returns a list with the hash of the images that a run with this `val_fraction` trains on.

    The list is empty if the fraction holds out none of the images, or all.
    """
    from fd_large.data.val_fraction import Part, places_of

    if not val_fraction:
        return [images.fingerprint]
    try:
        places = places_of(images, "train", val_fraction, where="--sweep")
    except DataError:  # The fraction holds out none of the images, or all.
        return []
    return [Part(images, places).fingerprint]
