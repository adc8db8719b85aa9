"""Principal components as colours, and the panel."""

import numpy
import pytest
from PIL import Image

from fd_large.report.features import _srgb, colours, draw_features, fit_basis, mean_cosine


@pytest.fixture
def tokens():
    generator = numpy.random.default_rng(1)
    # Three directions with falling spread, and a little of all others.
    spread = numpy.array([9.0, 4.0, 2.0, *[0.1] * 17])
    rotation, _ = numpy.linalg.qr(generator.normal(size=(20, 20)))
    return generator.normal(size=(4, 12, 12, 20)) * spread @ rotation.T + 3.0, rotation


def test_the_basis_is_that_of_the_largest_spreads(tokens):
    maps, rotation = tokens
    basis = fit_basis(maps)
    assert numpy.abs(basis.components @ basis.components.T - numpy.eye(3)).max() < 1e-9
    overlap = numpy.abs((basis.components * rotation[:, :3].T).sum(1))
    assert overlap.min() > 0.98
    # The sign does not hang on the solver.
    largest = numpy.abs(basis.components).argmax(1)
    assert (basis.components[numpy.arange(3), largest] > 0).all()


def test_the_first_component_is_lightness_and_equal_tokens_have_equal_colours(tokens):
    maps, _ = tokens
    basis = fit_basis(maps)
    steps = numpy.linspace(-1, 1, 5)[:, None] * basis.scale[0] * basis.components[0] + basis.mean
    shown = colours(steps, basis)
    assert (numpy.diff(shown.sum(-1)) > 0).all()
    assert numpy.ptp(shown, axis=-1).max() < 0.02
    assert (colours(maps, basis)[1] == colours(maps[1], basis)).all()
    assert colours(maps, basis).min() >= 0
    assert colours(maps, basis).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_fewer_channels_than_colours(channels):
    maps = numpy.random.default_rng(0).normal(size=(2, 12, 12, channels))
    assert colours(maps, fit_basis(maps)).shape == (2, 12, 12, 3)


def test_a_constant_map_has_one_colour():
    maps = numpy.ones((1, 12, 12, 5))
    assert numpy.isfinite(colours(maps, fit_basis(maps))).all()


@pytest.mark.parametrize(
    ("lab", "rgb"),
    [
        # Values of the CIE formulas for D65, as every colour calculator gives them.
        ((100.0, 0.0, 0.0), (255, 255, 255)),
        ((0.0, 0.0, 0.0), (0, 0, 0)),
        ((53.24, 80.09, 67.20), (255, 0, 0)),
        ((87.73, -86.18, 83.18), (0, 255, 0)),
        ((32.30, 79.19, -107.86), (0, 0, 255)),
        ((53.59, 0.0, 0.0), (128, 128, 128)),
    ],
)
def test_lab_to_srgb(lab, rgb):
    got = _srgb(*(numpy.array(value) for value in lab)) * 255
    assert got == pytest.approx(rgb, abs=1.0)


def test_cosine():
    maps = numpy.random.default_rng(0).normal(size=(12, 12, 5))
    assert mean_cosine(maps, 3 * maps) == pytest.approx(1)
    assert mean_cosine(maps, -maps) == pytest.approx(-1)
    assert mean_cosine(maps, 0 * maps) == 0


@pytest.mark.parametrize("features", [("before", "after"), ("after",), ("before",)])
def test_the_panel_is_a_picture(features, make_run, tmp_path):
    folder = make_run(features=features)
    assert draw_features(folder / "pictures", tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as picture:
        assert picture.width > 250 * (2 + len(features))
        assert picture.height > 500


def test_each_of_several_teachers_has_its_map_and_that_of_its_head(tmp_path):
    maps = numpy.random.default_rng(0).normal(size=(2, 4, 4, 5))
    names = [f"{whose}_{name}" for name in ("fine", "coarse") for whose in ("teacher", "student")]
    for when, update in (("before", 0), ("after", 9)):
        numpy.savez(
            tmp_path / f"features_{when}.npz",
            images=numpy.zeros((2, 8, 8, 3), numpy.uint8),
            update=numpy.int64(update),
            **dict.fromkeys(names, maps),
        )
    assert draw_features(tmp_path, tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as picture:
        assert 250 * 5 < picture.width < 250 * 6


def test_without_maps_there_is_no_panel(make_run, tmp_path):
    assert not draw_features(make_run(features=()) / "pictures", tmp_path / "panel.png")
    assert not (tmp_path / "panel.png").exists()
