"""The built-in photographs: real files, decoded once, none in both sets."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fd_large.data import photographs
from fd_large.data.decode import decode
from fd_large.data.photographs import HELD_OUT, REPEATS, TRAINING, Photographs
from fd_large.data.source import open_images
from fd_large.errors import DataError
from fd_large.ranks import distributed


@pytest.fixture(scope="module", params=[False, True], ids=["training", "held_out"])
def source(request):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return Photographs(request.param)


def test_no_scene_is_in_both_sets():
    assert len(set(HELD_OUT)) == 2
    scenes = [
        {n.split("/")[1].split(".")[0].split("_")[0] for n in s} for s in (HELD_OUT, TRAINING)
    ]
    assert not scenes[0] & scenes[1]
    assert sum(name.startswith("skimage/motorcycle") for name in TRAINING) == 2


def test_pictures_come_in_turn_and_decode_alike(source):
    count = len(source.names)
    assert len(source) == count * REPEATS
    assert [source[i] for i in range(count)] == list(source.names)
    assert source[len(source) - 1] == source.names[-1]
    assert source.read(0) is source.read(count)
    for index in range(count):
        image = decode(source.read(index), source[index])
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        # No image is smaller than a view of the quick start.
        assert min(image.shape[1:]) >= 128, source[index]
    with pytest.raises(IndexError):
        source[len(source)]


def test_pixels_are_those_of_the_files_and_no_decoder_warns(capfd, monkeypatch):
    skimage = pytest.importorskip("skimage")
    # As on several ranks, where the decoders' lines are not caught.
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    source = Photographs(False)
    assert not capfd.readouterr().err
    folder = Path(skimage.__file__).parent / "data"
    for index, name in enumerate(source.names):
        if name.startswith("skimage/") and name.endswith(".png"):
            with Image.open(folder / name.partition("/")[2]) as image:
                expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            assert torch.equal(decode(source.read(index), name), expected), name


def test_it_travels_to_workers(source):
    again = pickle.loads(pickle.dumps(source))
    assert again.read(1) == source.read(1)


def test_a_missing_package_is_one_sentence_with_its_remedy(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install scikit-image, .*--data.root"):
        Photographs(False)


def test_a_lost_file_is_named(monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(photographs, "TRAINING", ("skimage/lost.png",))
    with pytest.raises(DataError, match=r"lost\.png"):
        Photographs(False)


def test_they_open_by_name(source):
    held_out = source.names is HELD_OUT
    found = open_images("builtin:photographs" + "-held-out" * held_out)
    assert found.names == source.names
    assert found.fingerprint == source.fingerprint
    other = Photographs(not held_out)
    assert other.fingerprint != source.fingerprint
    with pytest.raises(DataError, match="got 'builtin:photos'"):
        open_images("builtin:photos")
