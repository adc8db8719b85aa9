"""Draws images next to the teacher's feature maps and the student's, before and after training.

The first three principal components of the teacher's whitened tokens are shown as lightness, blue
to yellow, and green to red (CIELAB's axes). This order lets people without red-green vision see
most of a map. The output of the student's head is shown in the teacher's basis and scale, so that
the same colour means the same feature. With several teachers, each teacher has two columns: its own
map, and the newest output of the student's head for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy

from fd_large.files import kind_of, unlinked
from fd_large.report import style

MOST_ROWS = 4
# In inches: a picture's side, the gaps beside and under it, the figure's edge, head and foot.
SIDE, GAP, UNDER, EDGE, HEADING, FOOT = 1.72, 0.11, 0.34, 0.09, 0.6, 0.5


class Basis(NamedTuple):
    """Three principal components of tokens, with the range of each for the colours.

    Attributes:
        mean: Mean of the tokens, (C,).
        components: The components, (3, C), orthonormal.
        scale: The 99th percentile of each component's absolute value, (3,). Tokens at this value
            get the strongest colour.
    """

    mean: numpy.ndarray
    components: numpy.ndarray
    scale: numpy.ndarray


def fit_basis(tokens: numpy.ndarray) -> Basis:
    """Returns the first three principal components of tokens (..., C), with the range of each.

    The sign of each component is chosen so that its entry of largest magnitude is positive.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(numpy.float64)
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    _, vectors = numpy.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :3].T
    if len(components) < 3:  # There are fewer channels than colours.
        components = numpy.pad(components, ((0, 3 - len(components)), (0, 0)))
    largest = numpy.abs(components).argmax(1)
    sign = numpy.sign(components[numpy.arange(3), largest])
    components = components * numpy.where(sign == 0, 1, sign)[:, None]
    scale = numpy.percentile(numpy.abs((flat - mean) @ components.T), 99, axis=0)
    return Basis(mean, components, numpy.where(scale > 0, scale, 1.0))


def colours(tokens: numpy.ndarray, basis: Basis) -> numpy.ndarray:
    """Returns the sRGB colours (..., 3), in [0, 1], of `tokens` (..., C).

    The three components of `basis` become lightness, blue to yellow, and green to red.
    """
    parts = numpy.clip((tokens - basis.mean) @ basis.components.T / basis.scale, -1, 1)
    lightness = 55 + 38 * parts[..., 0]
    return _srgb(lightness, 55 * parts[..., 2], 65 * parts[..., 1])


def mean_cosine(teacher: numpy.ndarray, student: numpy.ndarray) -> float:
    """Returns the cosine similarity of `teacher` and `student`, averaged over tokens.

    Both are maps of the same tokens, (..., C).
    """
    norms = numpy.linalg.norm(teacher, axis=-1) * numpy.linalg.norm(student, axis=-1)
    return float(((teacher * student).sum(-1) / numpy.maximum(norms, 1e-12)).mean())


@style.own_look
def draw_features(folder: Path, path: Path) -> bool:
    """Draws the feature maps in FOLDER/features_before.npz and features_after.npz as a PNG.

    Args:
        folder: Folder of the .npz files.
        path: The PNG.

    Returns: whether there are such files, and the PNG was drawn.
    """
    panels = {}
    for when in ("before", "after"):
        if kind_of(file := folder / f"features_{when}.npz") == "file":
            with numpy.load(file) as arrays:
                panels[when] = {name: arrays[name] for name in arrays.files}
    if not panels:
        return False
    from matplotlib.figure import Figure

    newest = panels.get("after") or panels["before"]
    # Runs of earlier versions may have recorded other views at their start.
    panels = {w: p for w, p in panels.items() if numpy.array_equal(p["images"], newest["images"])}
    images = newest["images"][:MOST_ROWS]
    columns: list[tuple[str, list[float] | None, numpy.ndarray]] = [("photograph", None, images)]
    sizes = []
    keys = [key for key in newest if key.startswith("teacher")]
    shown = panels if len(keys) == 1 else {"newest": newest}
    for key in keys:
        of = key.removeprefix("teacher").replace("_", " ", 1)
        basis = fit_basis(newest[key])
        teacher = newest[key][:MOST_ROWS]
        high, wide, channels = teacher.shape[1:]
        sizes.append(f"{of.strip()} {high} x {wide} tokens, {channels} channels".strip())
        columns.append((f"teacher{of}", None, colours(teacher, basis)))
        for panel in shown.values():
            student = panel[key.replace("teacher", "student", 1)][:MOST_ROWS]
            update = int(panel["update"])
            by = f"head for{of}" if of else "student"
            heading = f"{by}\nafter {update} steps" if update else f"{by}\nbefore training"
            cosines = [mean_cosine(t, s) for t, s in zip(teacher, student, strict=True)]
            columns.append((heading, cosines, colours(student, basis)))

    width = EDGE + len(columns) * (SIDE + GAP) - GAP + EDGE
    height = HEADING + len(images) * (SIDE + UNDER) + FOOT
    figure = Figure(figsize=(width, height), dpi=style.DPI)
    # All pictures share one frame in inches, since a frame for each would take most of the time.
    axes = figure.add_axes((0, 0, 1, 1))
    for column, (heading, cosines, pictures) in enumerate(columns):
        left = EDGE + column * (SIDE + GAP)
        centred = {"x": left + SIDE / 2, "ha": "center"}
        axes.text(**centred, y=HEADING - 0.06, s=heading, va="bottom", fontsize=style.TEXT_SIZE)
        for row, picture in enumerate(pictures):
            above = HEADING + row * (SIDE + UNDER)
            place = (left, left + SIDE, above + SIDE, above)
            axes.imshow(picture, interpolation="nearest", extent=place)
            if cosines is not None:
                axes.text(
                    **centred,
                    y=above + SIDE + 0.05,
                    s=f"cosine {cosines[row]:z.2f}",
                    va="top",
                    fontsize=style.SMALL_SIZE,
                    color=style.GREY,
                )
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.set_axis_off()
    whose, covered = ("the", "all") if len(sizes) == 1 else ("each", "its own and the student's")
    figure.text(
        EDGE / width,
        0.1 / height,
        f"Maps of {'; '.join(sizes)}; held-out photographs.\n"
        f"Colour: {whose} teacher's first three principal components, one basis for "
        f"{covered} maps.",
        fontsize=style.SMALL_SIZE,
        color=style.GREY,
        linespacing=1.4,
    )
    figure.savefig(unlinked(path))
    return True


def _srgb(lightness: numpy.ndarray, a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Returns the sRGB colours (..., 3) of CIELAB (D65) values, by IEC 61966-2-1.

    Colours outside of the gamut are clipped.

    Args:
        lightness, a, b: The axes L*, a* and b* of CIELAB, (...).
    """
    fy = (lightness + 16) / 116
    steps = numpy.stack([fy + a / 500, fy, fy - b / 200], -1)
    delta = 6 / 29
    xyz = numpy.where(steps > delta, steps**3, 3 * delta**2 * (steps - 4 / 29))
    xyz = xyz * (0.95047, 1.0, 1.08883)
    linear = xyz @ numpy.array(
        [
            [3.2404542, -0.9692660, 0.0556434],
            [-1.5371385, 1.8760108, -0.2040259],
            [-0.4985314, 0.0415560, 1.0572252],
        ]
    )
    linear = numpy.clip(linear, 0, 1)
    return numpy.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
