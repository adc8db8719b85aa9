"""Were the images that choose between recipes in the training of what is compared?

A sweep holds images out of its own trials. A student that was distilled on the same folder has seen
them all the same, and so has a teacher that an earlier run trained there: their accuracy on these
images says less than that of a model which never saw them. Distil with `--data.root FOLDER/train
--data.val_fraction 0.1`, and the images that a sweep holds out are held out there, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fd_large import files
from fd_large.errors import FDError
from fd_large.recipes.file_names import RECIPE
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe, run_of_checkpoint


def runs_that_saw(source: str, folder: str, fraction: float) -> list[str]:
    """Returns the runs of this project that led to a model and trained on held-out images.

    Runs are those whose folders are named by weights: the one that trained the model, those of its
    teachers and of what they began from. Datasets are compared by their paths.

    Args:
        source: The model's weights, as `teacher.source` takes them.
        folder: The folder of images, of which a part is held out.
        fraction: The part of them that a hash of their names holds out.

    Returns: folders, each with the recipe's name in brackets.
    """
    part = Path(folder).resolve()
    return [
        f"{path} ({run.name})"
        for path, run in _runs(source, set())
        if any(_saw(run, root, part, fraction) for root in _roots(run.data.root))
    ]


def _runs(source: str, met: set[Path]) -> Iterator[tuple[Path, Run]]:
    """The runs that weights come from, nearest first."""
    if not source:
        return
    with suppress(FDError, OSError):
        path = run_of_checkpoint(_place_of(source))
        if path in met or files.kind_of(path / RECIPE) != "file":
            return
        met.add(path)
        run = read_recipe(path, where="--sweep")
        yield path, run
        for before in (run.student.init, *(m.source for m in run.frozen_models.values())):
            yield from _runs(before, met)


def _place_of(source: str) -> str:
    """The path of weights without the name of a part; of stored targets that of their teacher's."""
    from fd_large.tasks.distillation.cached.files import Header
    from fd_large.tasks.distillation.section import CACHED

    if source.startswith(CACHED):
        cache = Path(source.removeprefix(CACHED))
        source = str(Header.read(cache, where="--sweep").teacher.get("source", ""))
    return source.partition("#")[0]


def _roots(root: str) -> list[str]:
    """The datasets of a recipe, of which it may name several by weight."""
    from fd_large.data.roots import weighted_roots

    return [part.root for part in weighted_roots(root)] or [root]


def _saw(run: Run, root: str, part: Path, fraction: float) -> bool:
    """Whether a run trained on images that are held out of a folder."""
    learnt = Path(root).resolve()
    if learnt == part:
        return run.data.val_fraction < fraction
    return bool(root) and (learnt in part.parents or part in learnt.parents)
