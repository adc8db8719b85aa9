"""Pictures and page of a diagnosis from its files alone, whatever is missing in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from html_page import check_page
from matplotlib.figure import Figure

from fd_large.report.diagnosis import draw_diagnosis, short
from fd_large.report.diagnosis_page import SENTENCES, notes, table, write_html, write_page


def layer(name: str, **more: Any) -> dict[str, Any]:
    return {
        "layer": name,
        "heads": 2,
        "grid": [2, 2],
        "window": [2, 2],
        "pixels_per_token": 16,
        "distance_pixels": [8.0, 12.0],
        "prefix_share": [0.0, 0.0],
        "head_similarity": 0.5,
        "patch_similarity": 0.4,
        "translation_score": 0.75,
        "average_variation": 0.3,
        **more,
    }


def landscape(**more: Any) -> dict[str, Any]:
    return {
        "loss": "change of its own map",
        "comparable": "change of its own map",
        "images": [4, 4],
        "value": [0.0, 0.0],
        "steps": [-0.2, -0.1, 0.0, 0.1, 0.2],
        "curves": [[[0.4, 0.1, 0.0, 0.3, 0.6], [0.4, 0.2, 0.0, 0.4, 0.6]]],
        "map_steps": [-0.2, 0.0, 0.2],
        "map": [[0.5, 0.4, 0.5], [0.4, 0.0, 0.6], [0.5, 0.4, 0.5]],
        **more,
    }


CROSS_ENTROPY = landscape(
    loss="cross-entropy",
    comparable="cross-entropy 1",
    value=[1.0, 2.0],
    curves=[[[1.5, 1.25, 1.0, 1.25, 1.5], [2.5, 2.25, 2.0, 2.25, 2.5]]],
)


def model(
    label: str, attention: list[dict[str, Any]], *losses: dict[str, Any], **more: Any
) -> dict[str, Any]:
    return {
        "label": label,
        "source": label,
        "net": "ViT",
        "parameters": 1_230_000,
        "image_size": 32,
        "positions": "relative",
        "is_supervised": False,
        "left_out": "",
        "attention": attention,
        "scratch": [{**part, "translation_score": 0.5} for part in attention],
        "landscapes": [*losses, landscape()],
        **more,
    }


def diagnosis(*models: dict[str, Any], cka: bool = True) -> dict[str, Any]:
    rows = numpy.eye(len(models)).tolist() if cka else []
    names = [["map"] if cka else []] * len(models)
    return {
        "root": "pictures",
        "images": 4,
        "device": "the CPU, 1 thread",
        "seconds": 1.5,
        "models": list(models),
        "cka": {"layers": names, "matrix": rows},
    }


@pytest.fixture
def drawn(tmp_path: Path):
    def draw(found: dict[str, Any]) -> set[str]:
        maps = {
            f"model_{m}_layer_{n}": numpy.full((4, 4), 0.25, numpy.float32)
            for m, of in enumerate(found["models"])
            for n, figures in enumerate(of["attention"])
            if figures["translation_score"] is not None
        }
        numpy.savez(tmp_path / "averages.npz", **maps)
        pictures = draw_diagnosis(tmp_path, found)
        page = write_page(tmp_path, found, pictures).read_text()
        assert all(f"({picture.name})" in page and picture.exists() for picture in pictures)
        of_one_file = check_page(write_html(tmp_path, found, pictures))
        assert of_one_file.tags.count("img") == len(pictures)
        assert {SENTENCES[picture.stem][1] for picture in pictures} <= set(of_one_file.words)
        return {picture.stem for picture in pictures}

    return draw


def test_every_picture_of_two_nets(drawn) -> None:
    two = model("a", [layer("attn")]), model("b" * 60, [], CROSS_ENTROPY)
    assert drawn(diagnosis(*two)) == set(SENTENCES)


def test_what_is_missing_is_left_out(drawn) -> None:
    bare = layer("attn", head_similarity=None, translation_score=None, average_variation=None)
    curves = [[[None, 0.1, 0.0, 0.1, None]]]
    gone = landscape(images=[4], value=[0.0], curves=curves, map=[[None] * 3] * 3)
    one = model("a", [bare], landscapes=[gone])
    pictures = drawn(diagnosis(one, cka=False))
    assert pictures == set(SENTENCES) - {"average_attention", "cka"}


@pytest.mark.parametrize(
    ("steeper", "titles"),
    [
        (2, {"a": (0, 1.2), "b": (0, 1.2)}),
        (20, {"a": (0, 0.6), "b\nown scale: 20 times as large": (0, 12)}),
        (0.02, {"a\nown scale: 50 times as large": (0, 0.6), "b": (0, 0.012)}),
    ],
)
def test_landscapes_share_a_scale_unless_one_model_is_far_steeper(
    steeper, titles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.stem: figure}))
    numpy.savez(tmp_path / "averages.npz")
    flat = landscape(curves=[[[0.4, 0.1, 0.0, 0.3, 0.6]]], value=[0.0])
    steep = landscape(
        curves=[[[steeper * value for value in flat["curves"][0][0]]]],
        map=[[steeper * value for value in row] for row in flat["map"]],
        value=[0.0],
    )
    models = (model("a", [], landscapes=[flat]), model("b", [], landscapes=[steep]))
    draw_diagnosis(tmp_path, diagnosis(*models))
    panels = {axes.get_title(loc="left"): axes for axes in figures["landscape"].axes}
    assert panels.keys() == titles.keys()
    for title, (low, high) in titles.items():
        margin = 0.04 * (high - low)
        assert panels[title].get_ylim() == pytest.approx((low - margin, high + margin))
    assert figures["landscape"].get_figwidth() > 6, "a panel for each model, as wide as one alone"
    *maps, first, second = figures["landscape_map"].axes
    assert [axes.get_title(loc="left") for axes in maps] == list(titles)
    bars = [bar.get_ylim() for bar in (first, second)]
    assert bars == [pytest.approx(limits) for limits in titles.values()]


@pytest.mark.parametrize("batches", [1, 3])
def test_a_curve_has_a_band_of_one_deviation_around_it(
    batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.stem: figure}))
    numpy.savez(tmp_path / "averages.npz")
    losses = numpy.array([[1.5, 1.2, 1.0, 1.1, 1.4], [2.6, 2.1, 2.0, 2.3, 2.4], [3, 3, 3, 3, 3.3]])
    own = losses[:batches, 2]
    found = landscape(value=own.tolist(), curves=[losses[:batches].tolist()], images=[4] * batches)
    draw_diagnosis(tmp_path, diagnosis(model("a", [], landscapes=[found])))
    (panel,) = figures["landscape"].axes
    change = losses[:batches] - own[:, None]
    mean = own.mean() + change.mean(0)
    assert panel.lines[0].get_ydata() == pytest.approx(mean)
    (band,) = panel.collections
    corners = band.get_paths()[0].vertices
    for step, middle, spread in zip(
        found["steps"], mean, change.std(0, ddof=1) if batches > 1 else [0.0] * 5, strict=True
    ):
        at = corners[numpy.isclose(corners[:, 0], step), 1]
        assert (at.min(), at.max()) == pytest.approx((middle - spread, middle + spread))


def test_the_table_has_means_over_layers_and_batches() -> None:
    layers = [layer("0"), layer("1"), layer("2", distance_pixels=[20.0, 40.0], head_similarity=0.8)]
    found = {name: cells for name, *cells in table([model("a", layers, CROSS_ENTROPY)])}
    assert found == {
        "parameters": ["1.23 M"],
        "images": ["32 px"],
        "positions": ["relative"],
        "attention distance": ["16.7 px"],
        "similarity of heads": ["0.60"],
        "similarity of heads, deep third": ["0.80"],
        "- among patches alone": ["0.40"],
        "- among patches alone, deep third": ["0.40"],
        "translation score": ["0.75"],
        "- of random weights": ["0.50"],
        "cross-entropy": ["1.50 +- 0.71"],
        "- change at step 0.1": ["0.250 +- 0.000"],
        "change of its own map at 0.1": ["0.250 +- 0.071"],
    }
    bare = {name: cells for name, *cells in table([model("a", []), model("b", [], CROSS_ENTROPY)])}
    assert "attention distance" not in bare
    assert bare["cross-entropy"] == ["none", "1.50 +- 0.71"]


def test_what_can_be_compared_is_said() -> None:
    other = {**CROSS_ENTROPY, "comparable": "cross-entropy 2"}
    layers = [layer("0")]
    models = [
        model("a", layers, CROSS_ENTROPY, is_supervised=True),
        model("b", layers, CROSS_ENTROPY, positions="absolute", is_supervised=True),
        model("c", layers, other, left_out="its objective is left out: gone"),
    ]
    said = notes(models)
    assert "cross-entropy of a and b can be compared." in said
    assert "cross-entropy of c can be compared with no other here." in said
    assert "change of its own map of a, b and c can be compared." in said
    assert "c: its objective is left out: gone" in said
    assert any(words.startswith("c: compare its score with that of a, with") for words in said)
    assert any("c: no run with relative positions" in words for words in notes(models[1:]))


def test_long_labels_are_cut() -> None:
    assert short("a" * 30) == "a" * 30
    assert len(short("vit_small_patch14_reg4_dinov2.lvd142m")) == 30


def test_every_figure_is_explained_in_two_sentences() -> None:
    for _, text in SENTENCES.values():
        assert len([part for part in text.split(". ") if part]) == 2, text
