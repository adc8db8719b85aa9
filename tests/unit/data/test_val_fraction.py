"""A test part by the names of the files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fd_large.data.folder import ImageFolder
from fd_large.data.labelled import open_held_out, open_split, open_training
from fd_large.data.val_fraction import Part, is_held_out, places_of
from fd_large.errors import DataError


def write(root: Path, names: list[str]) -> str:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), number % 256, np.uint8)).save(root / name)
    return str(root)


def names(count: int, first: int = 0) -> list[str]:
    return [f"{'ab'[n % 2]}/{n:04d}.png" for n in range(first, first + count)]


def held(root: str, part: str, fraction: float = 0.25) -> set[str]:
    images = ImageFolder(root)
    return {images[place] for place in places_of(images, part, fraction, where="data.root")}


def test_which_images_are_held_out_is_known_for_ever():
    found = [name for name in names(20) if is_held_out(name, 0.25)]
    assert [name[2:6] for name in found] == ["0002", "0005", "0010", "0013", "0014", "0017"]


def test_the_parts_are_disjoint_and_added_images_move_no_other(tmp_path):
    root = write(tmp_path, names(40))
    train, val = held(root, "train"), held(root, "val")
    assert not train & val
    assert len(train | val) == 40
    write(tmp_path, names(40, first=40))
    assert train < held(root, "train")
    assert val < held(root, "val")


def test_the_fraction_is_about_what_was_asked_for_and_a_larger_one_holds_the_smaller():
    many = [f"class/{number}.jpg" for number in range(20_000)]
    tenth = {name for name in many if is_held_out(name, 0.1)}
    fifth = {name for name in many if is_held_out(name, 0.2)}
    assert tenth < fifth
    assert (len(tenth), len(fifth)) == pytest.approx((2000, 4000), rel=0.1)


def test_both_parts_know_all_classes_and_read_their_own_images(tmp_path):
    root = write(tmp_path, names(40))
    train = open_split(root, "train", val_fraction=0.25)
    test = open_split(root, "val", train.classes, val_fraction=0.25)
    assert train.classes == test.classes == ("a", "b")
    assert train.fingerprint != test.fingerprint
    for part in (train, test, pickle.loads(pickle.dumps(train))):
        for index in range(len(part)):
            assert part.classes[part.label(index)] == Path(part[index]).parent.name
            assert bytes(part.read(index)) == Path(part[index]).read_bytes()
        with pytest.raises(IndexError):
            part[len(part)]


def test_training_without_labels_does_not_see_the_test_part(tmp_path):
    root = write(tmp_path, names(40))
    seen = open_training(root, val_fraction=0.25)
    assert {seen[index] for index in range(len(seen))} == held(root, "train")
    assert seen.fingerprint != open_training(root).fingerprint
    left = open_held_out(root, 0.25, where="eval.root")
    assert {left[index] for index in range(len(left))} == held(root, "val")
    assert seen.fingerprint != open_training(root, val_fraction=0.5).fingerprint


def test_a_folder_with_parts_and_what_is_no_folder_are_refused(tmp_path):
    root = write(tmp_path, [f"{part}/{name}" for part in ("train", "val") for name in names(8)])
    for refused in (
        lambda: open_split(root, "train", val_fraction=0.25),
        lambda: open_training(root, val_fraction=0.25),
    ):
        with pytest.raises(DataError, match=r"data\.val_fraction: .*already has parts"):
            refused()
    images = open_training(write(tmp_path / "train", names(8)))
    with pytest.raises(DataError, match=r"^data\.val_fraction: .*got Part"):
        places_of(Part(images, np.arange(8)), "train", 0.25, where="data.root")


def test_an_empty_part_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"0 of the 2 .* 1e-06"):
        open_training(write(tmp_path, names(2)), val_fraction=1e-6)


def test_what_is_said_of_the_parts_promises_nothing_of_other_runs(tmp_path, caplog):
    caplog.set_level("INFO")
    root = write(tmp_path, names(40))
    count = len(held(root, "val"))
    assert not caplog.messages
    held(root, "train")
    (told,) = caplog.messages
    assert f"{count} of 40 images of {root} " in told
    assert "was trained on" in told
    assert "never" not in told


def test_a_class_that_is_held_out_whole_is_said(tmp_path, caplog):
    # "c" has one image, which is held out.
    only = next(f"c/{n}.png" for n in range(100) if is_held_out(f"c/{n}.png", 0.25))
    open_split(write(tmp_path, [*names(40), only]), "train", val_fraction=0.25)
    assert "all images of 1 classes are held out (c)" in caplog.text
