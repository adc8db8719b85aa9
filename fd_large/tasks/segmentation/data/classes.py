"""Names of a dataset's classes, and the colours of classes in plots; torch is not imported."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import NamedTuple

from fd_large.errors import ConfigError
from fd_large.files import kind_of, read_bytes, read_json

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)


GOLDEN_SECTION = 0.6180339887


class Classes(NamedTuple):
    """The classes of a dataset.

    Attributes:
        names: The name of each class.
        colors: The colour of each class in plots: red, green and blue in 0..255.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]


def classes_of(root: str, count: int, file: str) -> Classes:
    """Returns names and colours of a dataset's classes.

    If `file` is not "", the names are those in `file`. Otherwise they are the names of ADE20K if
    objectInfo150.txt is in `root` or in its folder ADEChallengeData2016, or the names of Cityscapes
    if `root` has a folder leftImg8bit. If neither dataset is found, or if it has another number of
    classes than `count`, the names are "class 0", "class 1" and so on.

    Args:
        root: Folder of the dataset.
        count: Number of classes.
        file: A JSON file with names and optional colours (`task.segmentation.classes`), or "".

    Raises: ConfigError: if the file is invalid, or does not have a name for each class.
    """
    if file:
        return _classes_in(file, count)
    names = tuple(f"class {number}" for number in range(count))
    if kind_of(Path(root) / "leftImg8bit") == "folder" and count == len(CITYSCAPES_CLASSES):
        names = CITYSCAPES_CLASSES
    for folder in ("", "ADEChallengeData2016"):
        path = Path(root) / folder / "objectInfo150.txt"
        if kind_of(path) == "file":
            class_names = _ade20k_names(path)
            names = class_names if len(class_names) == count else names
    return Classes(names, colors_of(count))


def _ade20k_names(path: Path) -> tuple[str, ...]:
    """Reads the names of ADE20K's classes from `path`, the dataset's file objectInfo150.txt.

    A name is the first synonym in the last column of a line; the first line is skipped.
    """
    lines = read_bytes(path).decode(errors="replace").splitlines()[1:]
    return tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())


def _classes_in(file: str, count: int) -> Classes:
    where = "task.segmentation.classes"
    entries = read_json(Path(file), where=where, holds=list, remedy="Correct the file.")
    colors = list(colors_of(count))
    try:
        names = tuple(entry if isinstance(entry, str) else entry["name"] for entry in entries)
        for number, entry in enumerate(entries[:count]):
            if not isinstance(entry, str) and "color" in entry:
                red, green, blue = (int(value) for value in entry["color"])
                if not all(0 <= value <= 255 for value in (red, green, blue)):
                    raise ValueError(f"a colour {red:g} {green:g} {blue:g}")
                colors[number] = (red, green, blue)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{where}: invalid list of names; got {type(error).__name__}: {error} in {file}, "
            'expected ["wall", ...] or [{"name": "wall", "color": [120, 120, 120]}, ...]. '
            "Correct the file."
        ) from error
    if len(names) != count:
        raise ConfigError(
            f"{where}: not a name for each class; got {len(names)} in {file}, expected {count}. "
            "Set --task.segmentation.num_classes, or correct the file."
        )
    return Classes(names, tuple(colors))


def colors_of(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns an RGB colour, in 0..255, for each of `count` classes.

    Consecutive classes get dissimilar colours, whose hues differ by a golden section of the circle,
    and whose saturation and brightness cycle through three levels.
    """
    colors = []
    for number in range(count):
        saturation, value = ((0.85, 0.9), (0.55, 0.95), (0.8, 0.6))[number % 3]
        red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN_SECTION % 1, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colors)
