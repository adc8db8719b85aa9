"""What results show of themselves in a notebook: tables with their pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fd_large.report.run_files import RunFiles

_CELL = "text-align:left;padding:2px 12px 2px 0"


def run_html(files: RunFiles) -> str:
    """Returns a run's figures and pictures as HTML that needs no other file."""
    summary = files.summary
    rows = [
        (name, f"{section['model']} ({section['source']})")
        for name, section in files.frozen_models.items()
    ]
    rows.append(("student", files.recipe["student"]["model"]))
    rows.append(("steps", f"{summary.get('updates', 0)} of {summary.get('total_updates', '?')}"))
    losses = files.trained_loss
    if len(losses):
        rows.append((files.words("loss"), f"{losses[0]:.4f} → {losses[-1]:.4f}"))
    for name in files.measured:
        _, values = files.evaluated(name)
        shown = dict.fromkeys(f"{value:.4f}" for value in values[[0, -1]])
        rows.append((files.words(name), " → ".join(shown)))
    if best := summary.get("best"):
        words = files.words(best["metric"])
        rows.append(("best checkpoint", f"step {best['update']}, {words} {best['value']:.4f}"))
    if summary.get("images_per_second"):
        rows.append(("speed", f"{summary['images_per_second']:.1f} images/s"))
    if reason := summary.get("reason"):
        rows.append(("why it ended", str(reason)))
    rows.append(("folder", str(files.folder)))
    title = f"{files.recipe['name']}: {summary.get('status', 'not finished')}"
    pictures = files.folder / "pictures"
    return _page(title, rows, [pictures / "loss_curve.png", pictures / "features.png"])


def evaluation_html(summary: Mapping[str, Any], folder: Path) -> str:
    """Returns the accuracy of each model and their plot as HTML that needs no other file."""
    rows = []
    for model in summary["nets"]:
        values = model["accuracy"]
        accuracy = f"{sum(values) / len(values):.2f}%" if values else "not measured"
        rows.append((model["label"], accuracy))
    rows.append(("folder", str(folder)))
    title = f"{summary['task']}: accuracy on {summary['root']}"
    return _page(title, rows, [folder / f"{summary['task']}.png"])


def _page(title: str, rows: Sequence[tuple[str, str]], pictures: Sequence[Path]) -> str:
    table = "".join(
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{escape(text)}</td></tr>'
        for name, text in rows
    )
    # White behind them: they are drawn for light pages.
    images = "".join(
        '<img style="max-width:100%;background:white" '
        f'alt="{escape(path.stem.replace("_", " "))}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
        if path.is_file()
    )
    return f"<div><b>{escape(title)}</b><table>{table}</table>{images}</div>"
