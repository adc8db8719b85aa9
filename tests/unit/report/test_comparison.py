"""Accuracies of several models side by side: as a table and as a picture."""

from __future__ import annotations

from PIL import Image
from rich.console import Console

from fd_large.report import style
from fd_large.report.comparison import draw_comparison, spread, tables_of

SUMMARY = {
    "task": "finetune",
    "nets": [
        {
            "label": label,
            "image_size": 32,
            "accuracy": values,
            **spread(values),
        }
        for label, values in (("student", [71.0, 72.0, 73.0]), ("scratch", [60.0, 60.5, 61.0]))
    ],
}


def test_the_table_has_means_and_deviations():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables_of(SUMMARY, "k-NN"))
    text = console.export_text()
    assert "72.00" in text
    assert "1.00" in text
    assert "71.00 72.00 73.00" in text
    assert spread([4.0]) == {"mean": 4.0, "standard_deviation": None}


def test_a_difference_is_called_one_only_where_its_interval_excludes_zero():
    nets = [dict(net) for net in SUMMARY["nets"]]
    cells, captions = {}, {}
    for case, interval, over, is_shown, needs_seeds in (
        ("shown", [-12.0, -11.0], "images and seeds", True, False),
        ("none", [-12.0, 0.5], "images and seeds", False, False),
        ("one seed", [-12.0, -11.0], "images", False, True),
        ("not random", [-12.0, -11.0], "images", True, False),
    ):
        nets[1]["difference"] = {
            "to": "student",
            "mean": -11.5,
            "interval": interval,
            "over": over,
            "is_shown": is_shown,
            "needs_seeds": needs_seeds,
        }
        (table,) = tables_of({**SUMMARY, "nets": nets}, "k-NN")
        assert table.columns[-1].header == "minus the first"
        cells[case] = list(table.columns[-1].cells)[1]
        captions[case] = str(table.caption)
    assert cells == {
        "shown": "-11.50 (-12.00 to -11.00)",
        "none": "none shown (-12.00 to +0.50)",
        "one seed": "one seed: -11.50 (-12.00 to -11.00)",
        "not random": "-11.50 (-12.00 to -11.00)",
    }
    assert "test images and seeds" in captions["shown"]
    assert "no model is called better" in captions["one seed"]
    assert "Nothing else is random" in captions["not random"]


def test_a_sweep_is_a_row_for_each_decay_and_a_column_for_each_rate():
    points = ((2, 0.8, 71), (1, 0.8, 70.5), (1, 0.9, None), (2, 0.9, 69))
    trials = [
        {"recipe": "r", "rate": rate, "layer_decay": decay, "held_out_accuracy": accuracy}
        for rate, decay, accuracy in points
    ]
    trials.append({"recipe": "s", "rate": 1, "layer_decay": 0.8, "held_out_accuracy": 60})
    sweep = {"trials": trials, "recipe": "r", "rate": 2.0, "layer_decay": 0.8, "base_lr": 0.5}
    sweep |= {"at_edge": ["rate"], "held_out_seen_by": []}
    net = {**SUMMARY["nets"][0], "recipe": "r", "sweep": sweep}
    _, grid = tables_of({**SUMMARY, "nets": [net]}, "k-NN")
    assert [column.header for column in grid.columns[3:]] == ["rate x 1", "rate x 2", "best"]
    rows = [
        [str(cell) for cell in row] for row in zip(*(c.cells for c in grid.columns), strict=True)
    ]
    assert rows == [
        ["student", "r", "0.8", "70.50", "71.00", "rate x 2"],
        ["student", "r", "0.9", "diverged", "69.00", ""],
        ["student", "s", "0.8", "60.00", "", ""],
    ]
    assert "student: " in str(grid.caption), "its best is at an edge"
    assert "no run that led" in str(grid.caption)
    sweep["held_out_seen_by"] = ["runs/mine (fd)"]
    _, grid = tables_of({**SUMMARY, "nets": [net]}, "k-NN")
    assert "training images of runs/mine (fd)" in str(grid.caption)


def test_a_row_whose_recipe_differs_from_the_first_is_marked_with_the_difference():
    nets = [{**net, "recipe": "r", "unlike_first": {}} for net in SUMMARY["nets"]]
    nets[1]["unlike_first"] = {"recipe": ["q", "r"], "optim.layer_decay": [0.6, 1.0]}
    (table,) = tables_of({**SUMMARY, "nets": nets}, "k-NN")
    assert [str(cell) for cell in table.columns[1].cells] == ["r", "r *"]
    assert "* scratch: " in str(table.caption)
    assert "recipe r (q), optim.layer_decay 1 (0.6)" in str(table.caption)


def test_no_axis_goes_beyond_100_per_cent(tmp_path, monkeypatch):
    figures, new_figure = [], style.new_figure
    monkeypatch.setattr(
        style, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1]
    )
    for values in ([99.0, 100.0], [100.0], [0.0], [40.0, 60.0]):
        nets = [{"label": "a", "image_size": 32, "accuracy": values, **spread(values)}]
        draw_comparison({"task": "knn", "nets": nets}, "k-NN", tmp_path / "a.png")
        low, high = figures[-1].axes[0].get_xlim()
        assert 0 <= low < high <= 100
        assert low <= min(values) <= max(values) <= high


def test_the_picture_is_drawn(tmp_path):
    draw_comparison(SUMMARY, "k-NN", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 900
