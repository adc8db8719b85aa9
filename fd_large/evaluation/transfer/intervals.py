"""Computes the difference between two rows of `transfer`, with its interval, from run files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.evaluation.differences import as_json
from fd_large.recipes.file_names import EVALUATED, STEP

if TYPE_CHECKING:
    from fd_large.probes.redrawn import Redrawn

# The one score that is a mean over images, of which a run keeps every prediction.
_ACCURACY = "test_top1"


def of_runs(ours: Sequence[Path], others: Sequence[Path], score: str) -> dict[str, Any] | None:
    """Returns the difference of a score between two rows, with its interval.

    Args:
        ours: Folders of the runs of a row, one for each seed.
        others: Folders of the runs of the other row, one for each seed.
        score: Name of the score in a run's summary.json.

    Returns: the difference as `differences.as_json` returns it; or None if a run lacks the
        necessary files, as runs of earlier versions do, or the files do not match.
    """
    from fd_large.probes.paired import difference_of_redrawn

    if score == _ACCURACY:
        return _of_accuracies(ours, others)
    redrawn = [[_redrawn(folder, score) for folder in folders] for folders in (ours, others)]
    first, second = ([seed for seed in scores if seed] for scores in redrawn)
    if len(first) < len(ours) or len(second) < len(others):
        return None
    paired = difference_of_redrawn(first, second)
    return as_json(paired) if paired else None


def single_class(run: Path) -> bool:
    """Whether the model of a run predicts the same class for every test image.

    Without stored predictions of the run, the result is False.

    Args:
        run: Folder of the run.
    """
    from fd_large.engine.predictions import Predictions

    tested = Predictions.read(run)
    return tested is not None and len(set(tested.predicted[tested.labels >= 0].tolist())) == 1


def _of_accuracies(ours: Sequence[Path], others: Sequence[Path]) -> dict[str, Any] | None:
    import numpy as np

    from fd_large.engine.predictions import Predictions
    from fd_large.probes.paired import difference

    rows = [[Predictions.read(folder) for folder in folders] for folders in (ours, others)]
    all_ = [seed for row in rows for seed in row]
    labels = [seed.labels for seed in all_ if seed]
    if len(labels) < len(all_) or not all(np.array_equal(labels[0], seed) for seed in labels):
        return None
    known = labels[0] >= 0
    right, other = (
        np.stack([(seed.predicted == labels[0])[known] for seed in row if seed]) for row in rows
    )
    return as_json(difference(right, other)) if known.any() else None


def _redrawn(folder: Path, score: str) -> Redrawn | None:
    """Returns the score `score` of a run's newest evaluation, with its bootstrap samples.

    The result is None if the run in `folder` has stored no samples.
    """
    from fd_large.probes import redrawn

    steps = sorted((folder / EVALUATED).glob(f"{STEP}*"))
    return redrawn.read(steps[-1], score) if steps else None
