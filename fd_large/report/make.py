"""Makes the report of a run: plots, page, last entries of summary.json and closing text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fd_large.files import write_json
from fd_large.recipes.file_names import PICTURES, SUMMARY
from fd_large.report.closing import RUNNING, beats_constant, closing_text, next_steps
from fd_large.report.features import draw_features
from fd_large.report.loss_curve import draw_loss_curve
from fd_large.report.run_files import RunFiles, read_run
from fd_large.report.run_page import write_run_page


def make_report(folder: str | Path, *, running: bool = False) -> str:
    """Draws the plots, writes report.html and adds the last entries to summary.json.

    No summary.json is written for a run that has none, as before the run's first end.

    Args:
        folder: The run's folder.
        running: Whether the run is training now. A summary.json is then from before the run was
            resumed, and stays unchanged.

    Returns: the closing text. If a file could not be written, the last line says so.

    Raises:
        ConfigError: If the folder is not a run's.
        DataError: If a file in the folder is damaged.
    """
    files = read_run(folder)
    if running:
        files = replace(files, summary={"status": RUNNING})
    drawn: list[Path] = []
    try:
        _write(files, drawn, running=running)
    except OSError as error:  # Another user's folder, a full disk.
        return f"{closing_text(files, drawn)}\npictures and page: NOT WRITTEN: {error}"
    return closing_text(files, drawn)


def _write(files: RunFiles, drawn: list[Path], *, running: bool) -> None:
    """Writes the plots and the page, and adds the last entries to summary.json.

    Args:
        files: The run.
        drawn: List to which the path of each written plot is added.
        running: Whether the run is training now, so that summary.json stays unchanged.
    """
    pictures = files.folder / PICTURES
    pictures.mkdir(exist_ok=True)
    if draw_loss_curve(files, pictures / "loss_curve.png"):
        drawn.append(pictures / "loss_curve.png")
    if draw_features(pictures, pictures / "features.png"):
        drawn.append(pictures / "features.png")
    if files.summary and not running:
        files.summary["next"] = next_steps(files)
        better = beats_constant(files)
        first = {} if better is None else {"better_than_constant": better}
        write_json(files.folder / SUMMARY, {**first, **files.summary})
    write_run_page(files)
