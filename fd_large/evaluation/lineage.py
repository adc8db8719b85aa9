"""Finds the trainings that led to weights, as far as runs and exports record them.

A run's recipe names the weights of its teachers and the initial weights of its student. The
config.json of an export lists the runs that led to it, with the names of their datasets and the
hashes of their lists of images, but without paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fd_large import files
from fd_large.errors import FDError, without_secrets
from fd_large.recipes.file_names import RECIPE
from fd_large.recipes.stored import read_recipe, run_of_checkpoint

# An export is made of a handful of runs; a file from elsewhere may say anything.
_MOST, _LONGEST = 50, 200


class Training(NamedTuple):
    """Run that led to weights, or weights whose training is not recorded.

    Attributes:
        place: The run's folder, the export that records the run, or the source of the weights.
        recipe: Name of the run's recipe; empty if unknown.
        images: The run's datasets as in its recipe; from an export only the last part of each path.
        fingerprint: Hash of the images' names in order; empty if unknown.
        val_fraction: Fraction of the images that was held out, chosen by a hash of their names.
        is_here: Whether `place` is a run's folder; then `images` are paths on this machine.
    """

    place: str
    recipe: str = ""
    images: tuple[str, ...] = ()
    fingerprint: str = ""
    val_fraction: float = 0.0
    is_here: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the training's record for an export's config.json, without paths and secrets."""
        from fd_large.weights.origin import without_folders

        return {
            "recipe": self.recipe,
            "weights": "" if self.recipe else without_folders(self.place),
            "images": [without_folders(without_secrets(root)) for root in self.images],
            "fingerprint": self.fingerprint,
            "val_fraction": self.val_fraction,
        }

    def __str__(self) -> str:
        return f"{self.place} ({self.recipe})" if self.recipe else self.place


def trainings_of(source: str) -> list[Training]:
    """Returns the trainings that led to weights, the latest first; [] for random weights.

    Args:
        source: The weights, as `teacher.source` takes them.
    """
    return list(_trainings(source, set()))


def _trainings(source: str, met: set[str]) -> Iterator[Training]:
    from fd_large.weights.origin import is_random

    if is_random(source):
        return
    recorded: list[Training] = []
    with suppress(FDError, OSError):
        source = _weights_of_cache(source).partition("#")[0]
        run = run_of_checkpoint(source)
        is_run = files.kind_of(run / RECIPE) == "file"
        source = str(run) if is_run else source
        if source in met:
            return
        met.add(source)
        if is_run:
            yield from _of_run(run, met)
            return
        recorded = _told_by(source)
    yield from recorded or [Training(without_secrets(source))]


def _of_run(folder: Path, met: set[str]) -> Iterator[Training]:
    """Yields a run's training, and the trainings behind the weights that the run loaded.

    A run loads the initial weights of the student and the weights of the teachers.

    Args:
        folder: Folder of the run.
        met: Sources that were already visited.
    """
    from fd_large.checkpoint import store
    from fd_large.data.roots import weighted_roots

    run = read_recipe(folder, where="--sweep")
    root = run.data.root
    roots = tuple(part.root for part in weighted_roots(root)) or (root,)
    stored = store.complete(folder)
    fingerprint = stored[-1].manifest.get("pictures", "") if stored else ""
    yield Training(str(folder), run.name, roots, fingerprint, run.data.val_fraction, True)
    for before in (run.student.init, *(model.source for model in run.frozen_models.values())):
        yield from _trainings(before, met)


def _weights_of_cache(source: str) -> str:
    """Returns the source of the weights by which stored maps of a teacher were computed.

    Args:
        source: "cached:FOLDER", with the folder of the stored maps. Any other source is returned
            unchanged.
    """
    from fd_large.tasks.distillation.cached.files import Header
    from fd_large.tasks.distillation.section import CACHED

    if source.startswith(CACHED):
        cache = Path(source.removeprefix(CACHED))
        return str(Header.read(cache, where="--sweep").teacher.get("source", ""))
    return source


def _told_by(source: str) -> list[Training]:
    """Returns the trainings that the config.json of an export records.

    Args:
        source: The weights. Without a config.json that has such a record, the result is [].
    """
    from fd_large.weights.origin import file_beside
    from fd_large.weights.read import read_json
    from fd_large.weights.sidecar import OWN

    config = file_beside(source, "config.json")
    sidecar = read_json(config, where="--sweep").get(OWN) if config else None
    runs = sidecar.get("trained_by") if isinstance(sidecar, dict) else None
    trainings = []
    for run in runs[:_MOST] if isinstance(runs, list) else ():
        values = [run.get(name) for name in Training("").to_dict()] if isinstance(run, dict) else []
        match values:
            case [str(recipe), str(weights), list(images), str(fingerprint), float(val_fraction)]:
                names = tuple(str(image)[:_LONGEST] for image in images[:_MOST])
                place = without_secrets(f"{source}: {weights[:_LONGEST]}" if weights else source)
                recipe = recipe[:_LONGEST]
                trainings.append(Training(place, recipe, names, fingerprint, val_fraction))
    return trainings
