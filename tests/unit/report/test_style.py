"""What is fixed in a plot over steps, and what grows."""

import matplotlib
import pytest

from fd_large.report import style


def test_a_picture_has_the_same_look_for_all_users(tmp_path):
    @style.own_look
    def draw(path):
        figure = style.new_figure(3.0, 2.0)
        figure.subplots().set_title("title")
        figure.savefig(path)

    draw(tmp_path / "usual.png")
    with matplotlib.rc_context({"font.size": 20.0, "font.family": "serif", "savefig.dpi": 50}):
        draw(tmp_path / "own.png")
        assert matplotlib.rcParams["font.size"] == 20.0
    usual, own = ((tmp_path / f"{name}.png").read_bytes() for name in ("usual", "own"))
    assert usual == own


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("word", ["loss", "a very long name of a set of images"])
@style.own_look
def test_a_legend_takes_nothing_from_the_axes(count, word):
    figure = style.plot_figure(4.6, 2.6, left=0.6, right=0.2, bottom=0.45, top=0.36)
    axes = figure.subplots()
    axes.set_xlabel("steps", fontsize=8)
    inches = axes.get_position().height * figure.get_figheight()
    for number in range(count):
        axes.plot([0, 1], [0, 1], label=f"{word} {number}")
    style.legend_below(figure, 7)
    assert axes.get_position().height * figure.get_figheight() == pytest.approx(inches)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    seen = legend.get_window_extent()
    assert seen.x1 <= figure.bbox.width
    # Below the word under the axis, in the figure.
    assert seen.y1 < axes.get_tightbbox().y0
    assert seen.y0 >= 0
