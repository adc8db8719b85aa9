from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_twin import write_images

from fd_large.data.val_fraction import is_held_out
from fd_large.errors import ConfigError, DataError
from fd_large.tasks.dense.pairs import read_numbers
from fd_large.tasks.segmentation.data.classes import CITYSCAPES_CLASSES, classes_of, colors_of
from fd_large.tasks.segmentation.data.dataset import MODES, open_segmentation
from fd_large.tasks.segmentation.loss import IGNORED

LAYOUTS = {
    "ade20k": ("images/training/{}.jpg", "annotations/training/{}.png"),
    "unpacked": (
        "ADEChallengeData2016/images/training/{}.jpg",
        "ADEChallengeData2016/annotations/training/{}.png",
    ),
    "cityscapes": (
        "leftImg8bit/train/aachen/{}_leftImg8bit.png",
        "gtFine/train/aachen/{}_gtFine_labelTrainIds.png",
    ),
    "coco-stuff": ("train2017/{}.jpg", "stuffthingmaps/train2017/{}.png"),
    "converted": ("images/train2017/{}.jpg", "annotations/train2017/{}_labelTrainIds.png"),
    "folders": ("images/train/{}.jpg", "labels/train/{}.png"),
    "splits": ("train/images/a/{}.jpg", "train/labels/a/{}.png"),
}


def write(root: Path, layout: str, *, labels: np.ndarray | None = None, count: int = 3) -> Path:
    of_image, of_label = LAYOUTS[layout]
    values = np.array([[0, 1], [2, 255]], dtype=np.uint8) if labels is None else labels
    for number in range(count):
        for name, array in (
            (of_image, np.full((*values.shape[:2], 3), 10 * number, np.uint8)),
            (of_label, values),
        ):
            path = root / name.format(f"image_{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


def opened(root: Path, **options: object):
    given = {"num_classes": 3, "ignore_value": 255, "reduce_zero_label": False} | options
    return open_segmentation(str(root), "train", **given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_pairs_images_with_their_labels(layout, tmp_path):
    images = opened(write(tmp_path, layout))
    assert len(images) == 3
    for index in range(3):
        assert f"image_{index}" in images[index]
        assert f"image_{index}" in images.truth_file(index)
    image, labels = images.sample(1)
    assert image.shape == (3, 2, 2)
    assert labels.tolist() == [[0, 1], [2, IGNORED]]


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes"])
def test_a_part_is_chosen_by_the_images_paths_and_keeps_their_labels(layout, tmp_path):
    images = opened(write(tmp_path, layout, count=12))
    train, val = images.part("train", 0.5), images.part("val", 0.5)
    of_train, of_val = ({*part} for part in (train, val))
    assert of_train | of_val == {*images}
    assert not of_train & of_val
    assert of_val == {
        p for p in images if is_held_out(str(Path(p).relative_to(images.folder)), 0.5)
    }
    assert len({images.fingerprint, train.fingerprint, val.fingerprint}) == 3
    for part in (train, pickle.loads(pickle.dumps(val))):
        for index in range(len(part)):
            paths = part[index], part.truth_file(index)
            assert len({re.search(r"image_\d+", path)[0] for path in paths}) == 1
        with pytest.raises(IndexError):
            part[len(part)]
    with pytest.raises(DataError, match=r"^data\.val_fraction: a part without an image"):
        images.part("train", 1e-6)


def test_the_zero_label_is_reduced(tmp_path):
    images = opened(write(tmp_path, "ade20k"), reduce_zero_label=True, num_classes=2)
    assert images.truth(0).tolist() == [[IGNORED, 0], [1, IGNORED]]


def test_labels_of_palettes_and_of_16_bits(tmp_path):
    of_palette = Image.fromarray(np.array([[0, 3]], dtype=np.uint8), mode="P")
    of_palette.putpalette([7, 7, 7] * 256)
    of_palette.save(tmp_path / "palette.png")
    Image.fromarray(np.array([[0, 700]], dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, numbers in (("palette", [0, 3]), ("deep", [0, 700])):
        path = str(tmp_path / f"{name}.png")
        assert read_numbers(path, MODES, "labels").tolist() == [numbers]


def test_mistakes_of_the_user_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*'train'"):
        opened(tmp_path)
    root = write(tmp_path / "a", "folders")
    with pytest.raises(DataError, match=r"got 2, .* 0 to 1"):
        opened(root, num_classes=2)
    (root / "labels/train/image_1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 \(image_1\)"):
        opened(root)
    root = write(tmp_path / "b", "folders", labels=np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(DataError, match="mode RGB"):
        opened(root)
    root = write(tmp_path / "c", "folders")
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(root / "labels/train/image_0.png")
    with pytest.raises(DataError, match=r"got 4 x 5 .* 2"):
        opened(root).sample(0)
    (root / "labels/train/image_0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image_0\.png: .*decoded"):
        opened(root)


@pytest.mark.parametrize("reduces", [False, True])
@pytest.mark.parametrize("number", [65537, 65535, -1, -65535])
def test_numbers_that_int16_would_change_are_refused(number, reduces, tmp_path):
    root = write(tmp_path, "folders")
    labels = np.array([[1, 2], [255, number]], dtype=np.int32)
    for file in (root / "labels/train").iterdir():
        # PIL reads by the content, and a PNG has no 32 bits.
        Image.fromarray(labels).save(file, format="TIFF")
    with pytest.raises(DataError, match=rf"got {number}, expected {int(reduces)} "):
        opened(root, reduce_zero_label=reduces)


def test_classes_come_from_the_dataset_a_file_or_their_numbers(tmp_path):
    root = write_images(tmp_path / "ade")
    assert classes_of(str(root), 4, "").names == ("red", "green", "blue", "grey")
    assert classes_of(str(root), 5, "").names[4] == "class 4"
    (tmp_path / "city/leftImg8bit").mkdir(parents=True)
    assert classes_of(str(tmp_path / "city"), 19, "").names == CITYSCAPES_CLASSES
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(["a", {"name": "b", "color": [1, 2, 3]}]))
    found = classes_of(str(root), 2, str(file))
    assert found.names == ("a", "b")
    assert found.colors == (colors_of(2)[0], (1, 2, 3))
    colors = ("[1e999, 1, 1]", f"[1{'0' * 400}, 1, 1]", "[-1, 1, 1]", "[256, 1, 1]", "[NaN, 1, 1]")
    wrong = (f'[{{"name": "a", "color": {color}}}, "b"]' for color in colors)
    for content in ('{"a": 1}', '["a"]', "[1, 2]", "no json", *wrong):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"task\.segmentation\.classes"):
            classes_of(str(root), 2, str(file))


def test_colors_differ():
    assert len(set(colors_of(255))) == 255
