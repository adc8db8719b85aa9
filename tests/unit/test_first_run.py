"""The notebook of docs/: its cells run with tiny settings."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "first_run.ipynb"
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
VIT = {"embed_dim": 8, "depths": [1], "num_heads": [2], "patch_size": 8, "image_size": 16}
TINY = {
    "student.architecture": SWIN,
    "teacher": {"model": "vit_base_patch16", "source": "random", "architecture": VIT},
    "data": {"image_size": 16, "workers": 0},
    "batch": {"global_batch_size": 4, "micro_batch_size": 4},
    "eval.views": 4,
    "optim.warmup_epochs": 0,
}


def book(out: Path, fields: dict | None) -> nbformat.NotebookNode:
    """The notebook with two steps, a folder for its files, and other fields."""
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    settings = next(c for c in found.cells if "parameters" in c.metadata.get("tags", ()))
    settings.source = f"STEPS = 2\nOUT = {str(out)!r}\nFIELDS = {fields or {'data.workers': 0}!r}"
    return found


def test_every_cell_runs(tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: None)
    names: dict = {}
    for cell in book(tmp_path / "run", TINY).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{NOTEBOOK.name}: {cell.id}", "exec"), names)
    pyplot.close("all")
    assert names["result"].status == "done"
    assert names["result"].best is not None
    # The teacher has two here: the mean of its patches, and its class token.
    assert len(names["probe"].accuracy) == 4
    assert names["difference"].abs().max() < 1e-4
    assert (names["exported"] / "README.md").is_file()


@pytest.mark.sweep
def test_it_runs_in_a_kernel_and_shows_tables_and_pictures(tmp_path):
    from nbclient import NotebookClient

    ran = book(tmp_path / "run", None)
    NotebookClient(ran, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in ran.cells for out in cell.get("outputs", ())]
    texts = "".join(out["text"] for out in outputs if out["output_type"] == "stream")
    assert "after 2 steps: held-out loss" in texts
    assert "\x1b[2K" not in texts, "a notebook cannot move a bar"
    assert "error" not in texts
    shown = [out.get("data", {}) for out in outputs]
    html = [data["text/html"] for data in shown if "text/html" in data]
    assert [len(re.findall("data:image/png", page)) for page in html] == [2, 1]
    assert any("image/png" in data for data in shown), "the maps"
