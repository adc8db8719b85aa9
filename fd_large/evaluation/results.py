"""Writes a protocol's results: the table, the plot, summary.json, predictions.npz and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.errors import without_secrets
from fd_large.evaluation.protocol import Repeated, Request, Result
from fd_large.evaluation.sweep import Sweep
from fd_large.files import unlinked, write_json
from fd_large.recipes.file_names import PAGE, SUMMARY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fd_large.engine.find_model import NamedModel


@dataclass
class Row:
    """Row of the table of results.

    Attributes:
        model: The measured model.
        values: The accuracy of each seed, in per cent.
        details: Further results of each seed, by name.
        predicted: The predicted class of each test image, (N,), for each seed, on rank 0. Runs of
            earlier versions stored no predictions, so there may be fewer entries than seeds.
        labels: The class of each test image, (N,), or `NO_LABEL` for an image that could not be
            decoded.
        recipe: Name of the recipe by which the model was trained; "" for a frozen model.
        unlike_first: Differences between the recipes of the first row of the same pooling and of
            this row, {field: (the first row's value, this row's value)}.
        sweep: Result of the sweep before the training, or None without a sweep.
        feature: Name of the feature in the table, if the model has several rows.
        pool: Pooling of the feature. A row is compared with the first row of the same pooling.
    """

    model: NamedModel
    values: list[float] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    predicted: list[NDArray[np.int64]] = field(default_factory=list)
    labels: NDArray[np.int64] | None = None
    recipe: str = ""
    unlike_first: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    sweep: Sweep | None = None
    feature: str = ""
    pool: str = ""

    def add(
        self, value: float, details: Mapping[str, Any], predicted: NDArray[np.int64] | None
    ) -> None:
        """Adds the result of the next seed.

        Args:
            value: The accuracy in per cent.
            details: Further results, by name.
            predicted: The predicted class of each test image, (N,), or None if not stored.
        """
        self.values.append(value)
        self.details.append(dict(details))
        if predicted is not None:
            self.predicted.append(predicted)

    def right(self) -> NDArray[np.bool_] | None:
        """Returns whether each image was classified correctly, (seeds, images) bool.

        Images without a label (`NO_LABEL`) are left out. The result is None if the row has no
        labels, or lacks the predictions of a seed.
        """
        import numpy as np

        if self.labels is None or len(self.predicted) < len(self.values):
            return None
        return (np.stack(self.predicted) == self.labels)[:, self.labels >= 0]


# Names in summary.json for which the page has other words.
_FACTS = {"pictures": "test images"}


def finish(
    folder: Path, rows: Sequence[Row], title: str, *, is_random: bool = True, **facts: Any
) -> Result:
    """Writes the plot, the page, summary.json and predictions.npz, on rank 0.

    Args:
        folder: Folder for the files.
        rows: The rows of the table. Each row is compared with the first row of its pooling, and
            the first row of a pooling with the first row of the table.
        title: Title of the table, the plot and the page.
        is_random: Whether the accuracies depend on the seed.
        facts: Further entries of summary.json, such as task, root and seeds.

    Returns: the tables and the files, on rank 0; an empty result on other ranks.
    """
    from fd_large.ranks import distributed

    if not distributed.is_main():
        return Result()
    import torch

    from fd_large.report.comparison import draw_comparison, spread, tables_of
    from fd_large.report.evaluation_page import write_evaluation_page

    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    labels = _labels(rows)
    if labels is not None:
        facts["constant_accuracy"] = _constant_accuracy(labels)
    summary = {
        **facts,
        "device": f"{distributed.world_size()} x {name}",
        "nets": [_as_json(row, _beside(row, rows), is_random) | spread(row.values) for row in rows],
    }
    write_json(folder / SUMMARY, summary)
    _write_predictions(folder / "predictions.npz", labels, rows)
    plot = folder / f"{facts['task']}.png"
    draw_comparison(summary, title, plot)
    shown = tables_of(summary, title)
    how = {**facts, **facts.get("settings", {})}
    left_out = ("task", "settings", "constant_accuracy")
    page = write_evaluation_page(
        folder / PAGE,
        title,
        shown,
        [plot],
        facts=[
            (_FACTS.get(k, k.replace("_", " ")), v) for k, v in how.items() if k not in left_out
        ],
        below=f"{', '.join(map(_label, rows))}; {summary['device']}",
    )
    return Result(shown, (folder / SUMMARY, plot, page))


def finish_frozen(request: Request, rows: Sequence[Row], **facts: Any) -> Result:
    """Writes the results of a protocol on frozen models; see `finish`.

    Args:
        request: The user's request.
        rows: The rows of the table.
        facts: Further entries of summary.json, besides task and root.
    """
    assert request.run is not None  # The command `evaluate` has a recipe.
    protocol, root = request.protocol, without_secrets(request.run.data.root)
    is_random = issubclass(protocol.flags, Repeated)
    facts = {"task": protocol.name, "root": root, **facts}
    return finish(Path(request.flags.out), rows, protocol.title, is_random=is_random, **facts)


def _as_json(row: Row, first: Row, is_random: bool) -> dict[str, Any]:
    """Returns the entry of a row in summary.json, with its difference from another row.

    Args:
        row: The row.
        first: The row with which `row` is compared.
        is_random: Whether the accuracies depend on the seed.
    """
    from fd_large.evaluation.differences import as_json
    from fd_large.probes.paired import difference

    entry: dict[str, Any] = {
        "label": _label(row),
        "source": row.model.source,
        "image_size": row.model.image_size,
        "accuracy": row.values,
        "details": row.details,
    }
    if row.recipe:
        entry |= {"recipe": row.recipe, "unlike_first": dict(row.unlike_first)}
    if row.sweep:
        entry["sweep"] = row.sweep.as_json()
    right, other = row.right(), first.right()
    if row is not first and right is not None and other is not None:
        paired = difference(right, other)
        entry["difference"] = {"to": _label(first), **as_json(paired, is_random=is_random)}
    return entry


def _beside(row: Row, rows: Sequence[Row]) -> Row:
    """Returns the row with which a row is compared.

    It is the first row of the same pooling, or for this row itself the first row of the table.

    Args:
        row: The row.
        rows: All rows of the table.
    """
    of_kind = next(other for other in rows if other.pool == row.pool)
    return rows[0] if of_kind is row else of_kind


def _label(row: Row) -> str:
    return f"{row.model.label}, {row.feature}" if row.feature else row.model.label


def _labels(rows: Sequence[Row]) -> NDArray[np.int64] | None:
    """Returns the class of each test image, (N,), from the first of `rows` that has the classes.

    The result is None if no row has them.
    """
    return next((row.labels for row in rows if row.labels is not None), None)


def _constant_accuracy(labels: NDArray[np.int64]) -> float:
    """Returns the accuracy, in per cent, of always predicting the most common class.

    Args:
        labels: The class of each image, (N,); negative for an image that does not count. The
            result is 0 if no image counts.
    """
    import numpy as np

    counts = np.bincount(labels[labels >= 0], minlength=1)
    return float(100 * counts.max() / max(counts.sum(), 1))


def _write_predictions(path: Path, labels: NDArray[np.int64] | None, rows: Sequence[Row]) -> None:
    """Writes the test images' classes and the models' predictions to an .npz file.

    Args:
        path: The file.
        labels: The class of each image, (N,), stored as `labels`. For None, no file is written.
        rows: The rows of the table. The predictions of a row, (seeds, N), are stored as
            `predicted/LABEL`; a row that lacks predictions is left out.
    """
    import numpy as np

    # A prefix, since a model may be labelled "labels".
    predictions: dict[str, Any] = {
        f"predicted/{_label(row)}": np.stack(row.predicted)
        for row in rows
        if row.right() is not None
    }
    if labels is not None:
        np.savez_compressed(unlinked(path), labels=labels, **predictions)
