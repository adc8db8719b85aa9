"""The page of what was measured."""

from __future__ import annotations

from html_page import check_page
from PIL import Image
from rich.table import Table
from rich.text import Text

from fd_large.report.evaluation_page import write_evaluation_page


def test_tables_pictures_and_how_it_was_measured(tmp_path):
    table = Table(title="Accuracy")
    table.add_column("model")
    table.add_column("mean", justify="right")
    table.add_row(Text("a <b>"), "12.5")
    table.add_row("c", "3.25")
    Image.new("RGB", (8, 8)).save(tmp_path / "knn.png")
    drawn = [tmp_path / "knn.png", tmp_path / "gone.png"]
    path = write_evaluation_page(
        tmp_path / "report.html", "k-NN", [table], drawn, facts=[("k", 20)], below="a, c"
    )
    page = check_page(path)
    assert {"Accuracy", "model", "a <b>", "12.5", "3.25", "k", "20", "a, c"} <= set(page.words)
    assert page.tags.count("img") == 1
