"""Shows results in a notebook, as HTML tables with embedded plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fd_large.recipes.file_names import PICTURES
from fd_large.report import html
from fd_large.report.closing import (
    called,
    closing_rows,
    progress,
    status_words,
    worse_than_constant,
)
from fd_large.report.run_files import RunFiles


def run_html(files: RunFiles) -> str:
    """Returns a run's results and plots as self-contained HTML."""
    rows = closing_rows(files)
    if doubt := worse_than_constant(files):
        rows.insert(0, ("worse than a constant", doubt))
    if reason := files.summary.get("reason"):
        rows.append(("why it ended", str(reason)))
    rows.append(("folder", str(files.folder)))
    pictures = files.folder / PICTURES
    return _shown(
        f"{called(files)}: {status_words(files)}, {progress(files)}",
        rows,
        [pictures / "loss_curve.png", pictures / "features.png"],
    )


def evaluation_html(summary: Mapping[str, Any], folder: Path) -> str:
    """Returns each model's accuracy, and the plot, as self-contained HTML.

    Args:
        summary: Content of the evaluation's summary.json.
        folder: Folder of the evaluation.
    """
    rows = [(net["label"], f"{net['mean']:.2f}%") for net in summary["nets"]]
    rows.append(("folder", str(folder)))
    title = f"{summary['task']}: accuracy on {summary['root']}"
    return _shown(title, rows, [folder / f"{summary['task']}.png"])


def _shown(title: str, rows: Sequence[tuple[str, str]], pictures: Sequence[Path]) -> str:
    images = "".join(html.picture(path, path.stem.replace("_", " ")) for path in pictures)
    return f"<div><b>{html.text(title)}</b>{html.table(rows)}{images}</div>"
