"""The loss curve."""

import json

import numpy
import pytest
from matplotlib.axes import Axes
from PIL import Image

from fd_large.report import loss_curve
from fd_large.report.loss_curve import draw_loss_curve, smoothed
from fd_large.report.run_files import read_run


def test_smoothing_keeps_a_line_and_lessens_noise():
    line = numpy.linspace(3, 1, 400)
    assert smoothed(line) == pytest.approx(line)
    noise = numpy.random.default_rng(0).normal(size=2000)
    assert smoothed(noise).std() < 0.3 * noise.std()
    assert smoothed(noise[:7]) == pytest.approx(noise[:7])


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("updates", [1, 2, 60])
def test_it_is_a_picture(updates, held_out, make_run, tmp_path):
    files = read_run(make_run(updates=updates, held_out=held_out))
    assert draw_loss_curve(files, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        # Higher by a row of names.
        assert picture.size == (1200, 765 if held_out else 732)


def test_one_baseline_stands_in_the_gaps_of_another_at_its_height(make_run, tmp_path, monkeypatch):
    folder = make_run()
    row = {"update": 60, "held_out_best_constant": 0.4, "unseen_crops_best_constant": 0.4}
    row |= {"held_out_loss": 0.3, "unseen_crops_loss": 0.2}
    (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    lines = []
    monkeypatch.setattr(Axes, "axhline", lambda axes, height, **look: lines.append((height, look)))
    draw_loss_curve(read_run(folder), tmp_path / "curve.png")
    (first, look), (second, other) = lines
    assert first == second
    (start, (dash, gap)), (begins, _) = look["linestyle"], other["linestyle"]
    assert begins - start == dash <= gap


def test_a_loss_that_is_no_number_is_left_out(make_run, tmp_path):
    folder = make_run(updates=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"update": 10, "loss": float("nan"), "learning_rate": 0.0}) + "\n")
    assert draw_loss_curve(read_run(folder), tmp_path / "curve.png")


def test_skipped_updates_neither_bend_nor_break_the_curve(make_run, tmp_path, monkeypatch):
    folder = make_run(updates=60, held_out=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[20] |= {"loss": float("nan"), "skipped": True}
    rows[59] |= {"loss": 1e6, "skipped": True}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(loss_curve, "smoothed", lambda values: drawn.append(values) or values)
    files = read_run(folder)
    assert draw_loss_curve(files, tmp_path / "curve.png")
    assert drawn[0] == pytest.approx([0.5 - i / 300 for i in range(59) if i != 20])
    assert files.updates[-1] == 60, "it has run all the same"
    assert files.trained_loss[-1] == pytest.approx(0.5 - 58 / 300)


def test_the_title_names_teachers_and_breaks(make_run, tmp_path, monkeypatch):
    folder = make_run(updates=3)
    recipe = json.loads((folder / "recipe.json").read_text())
    names = ("fine", "coarse", "one_whose_name_is_rather_long", "another")
    recipe["teachers"] = {name: recipe["teacher"] for name in names}
    recipe["teacher"] = {**recipe["teacher"], "source": ""}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **how: titles.append(text))
    assert draw_loss_curve(read_run(folder), tmp_path / "curve.png")
    first, second = titles[0].splitlines()
    assert first.endswith("learns from fine, coarse,")
    assert second.endswith("another")


def test_before_the_first_update_there_is_none(make_run, tmp_path):
    files = read_run(make_run(updates=0))
    assert not draw_loss_curve(files, tmp_path / "curve.png")
