"""Sources of images of the user's own."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from plugins import install

from fd_large import doors
from fd_large.data.decode import decode
from fd_large.data.labelled import open_split
from fd_large.data.source import open_images
from fd_large.errors import ConfigError, DataError

SOURCE = """
import numpy as np

class Arrays:
    def __init__(self, part=""):
        count = 4 if part == "val" else 12
        self.images = np.arange(count * 6 * 5 * 3, dtype=np.uint32).reshape(count, 6, 5, 3) % 251

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].astype(np.uint8)

    def labels(self):
        return np.arange(len(self)) % 3, ("ant", "bee", "cow")

class Grey(Arrays):
    labels = None
    fingerprint = "grey-1"

    def __getitem__(self, index):
        return super().__getitem__(index)[:, :, 0]

class Broken(Arrays):
    def __getitem__(self, index):
        if index == 3:
            raise KeyError("row 3")
        return super().__getitem__(index).astype(float if index == 4 else np.uint8)

class FromThirtyOn(Arrays):
    count = 40

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index < 30:
            raise ValueError(f"bad row {index}")
        return super().__getitem__(index % 12)

class Never(FromThirtyOn):
    count = 30

class Floats(Arrays):
    def labels(self):
        return [0.5] * len(self), None

class Few(Arrays):
    def labels(self):
        return np.arange(len(self)), ("ant", "bee")

class Lost(Arrays):
    def labels(self):
        raise OSError("no labels")

def empty():
    return []

def fails():
    raise OSError("no table")
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "arrays.py"
    path.write_text(SOURCE)
    doors.allow(path)
    return f"module:{path}"


def test_arrays_come_through_decoding_as_they_are(own):
    images = open_images(f"{own}:Arrays")
    assert len(images) == 12
    pixels = decode(images.read(7), images[7]).permute(1, 2, 0).numpy()
    expected = (np.arange(12 * 90).reshape(12, 6, 5, 3) % 251)[7]
    np.testing.assert_array_equal(pixels, expected)
    assert "Arrays" in images[7]
    with pytest.raises(IndexError):
        images[12]


def test_grey_arrays_have_three_channels_alike(own):
    images = open_images(f"{own}:Grey")
    assert images.fingerprint == "grey-1"
    pixels = decode(images.read(0), images[0])
    assert (pixels == pixels[:1]).all()


def test_the_fingerprint_is_that_of_the_content(own, tmp_path):
    other = tmp_path / "others.py"
    other.write_text(SOURCE.replace("% 251", "% 250"))
    doors.allow(other)
    first, again, changed = (
        open_images(f"{name}:Arrays").fingerprint for name in (own, own, f"module:{other}")
    )
    assert first == again != changed


def test_parts_of_a_labelled_source(own):
    train = open_split(f"{own}:Arrays", "train")
    val = open_split(f"{own}:Arrays", "val", train.classes)
    assert (len(train), len(val)) == (12, 4)
    assert train.classes == ("ant", "bee", "cow")
    assert [val.label(i) for i in range(4)] == [0, 1, 2, 0]


def test_an_image_that_fails_is_a_bad_image(own):
    images = open_images(f"{own}:Broken")
    with pytest.raises(DataError, match=r"KeyError: 'row 3' in .*arrays\.py line \d+"):
        images.read(3)
    with pytest.raises(DataError, match="float64"):
        images.read(4)


def test_a_source_is_opened_if_one_of_ten_images_can_be_read(own):
    images = open_images(f"{own}:FromThirtyOn")
    with pytest.raises(DataError, match="bad row 0"):
        images.read(0)
    assert images.read(39)
    with pytest.raises(DataError, match=r"image 0: .*ValueError: bad row 0"):
        open_images(f"{own}:Never")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("empty", DataError, "length 0"),
        ("fails", DataError, r"OSError: no table in .*arrays\.py line \d+"),
        ("Nothing", ConfigError, "'Nothing'"),
        ("missing.py:Arrays", ConfigError, "data.root"),
    ],
)
def test_what_is_no_source(own, tmp_path, name, error, words):
    root = f"module:{tmp_path}/{name}" if ".py" in name else f"{own}:{name}"
    with pytest.raises(error, match=words):
        open_images(root)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Floats", "float64"), ("Few", "got label 11"), ("Lost", "OSError: no labels")],
)
def test_what_are_no_labels(own, name, words):
    with pytest.raises(DataError, match=words):
        open_split(f"{own}:{name}", "train")


def test_a_spawned_loading_process_opens_it_again(own):
    images = open_images(f"{own}:Arrays")
    read = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read(0))"
    found = subprocess.run(
        [sys.executable, "-c", read], input=pickle.dumps(images), stdout=subprocess.PIPE, check=True
    )
    assert found.stdout == images.read(0)


def test_an_installed_package_brings_a_source(own, tmp_path, monkeypatch):
    install(tmp_path, "sources", "arrays = arrays:Arrays")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(open_images("arrays")) == 12
    assert len(open_split("arrays", "val")) == 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    with pytest.raises(DataError, match=r"^data\.root: .*got 'arrays'"):
        open_images("arrays")  # A folder of that name comes first.
    monkeypatch.delitem(sys.modules, "arrays")
