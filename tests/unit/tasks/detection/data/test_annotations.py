from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from coco import annotation, square, write_set
from detection_twin import pictures as write_pictures
from pretended_ranks import World
from pycocotools.coco import COCO

from fd_large.data import listing
from fd_large.data.val_fraction import is_held_out
from fd_large.errors import ConfigError, DataError
from fd_large.ranks import meeting
from fd_large.tasks.detection.data import annotations as annotations_module
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.annotations import open_coco

SIZES = {5: (40, 60), 9: (50, 30)}


def test_the_real_set_has_its_published_counts(coco_tiny):
    for split, pictures, objects, crowds in (("val", 54, 461, 5), ("train", 30, 426, 9)):
        opened = open_coco(str(coco_tiny), split)
        found = [opened.objects(index) for index in range(len(opened))]
        assert len(opened) == pictures
        assert sum(len(of.boxes) for of in found) == objects
        assert sum(len(of.crowd_boxes) for of in found) == crowds
        assert len(opened.category_ids) == 80
        assert (opened.category_ids[0], opened.category_ids[-1]) == (1, 90)
        assert (opened.category_names[0], opened.category_names[79]) == ("person", "toothbrush")
        assert opened.findings.lines() == []
        ids = [opened.image_id(index) for index in range(len(opened))]
        assert ids == sorted(ids)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_objects_and_filled_masks_are_those_of_pycocotools(coco_tiny):
    opened = open_coco(str(coco_tiny), "val")
    theirs = COCO(str(coco_tiny / "annotations" / "instances_val.json"))
    for index in range(len(opened)):
        target, number = opened.target(index), opened.image_id(index)
        expected = theirs.loadAnns(theirs.getAnnIds(imgIds=number, iscrowd=False))
        assert opened[index].endswith(theirs.imgs[number]["file_name"])
        assert opened.size(index) == (theirs.imgs[number]["height"], theirs.imgs[number]["width"])
        assert target.image_id == number
        assert len(target.boxes) == len(expected)
        assert target.masks.shape == (len(expected), *opened.size(index))
        for box, label, mask, entry in zip(*target[:3], expected, strict=True):
            left, top, width, height = entry["bbox"]
            np.testing.assert_allclose(box, [left, top, left + width, top + height], atol=1e-3)
            assert opened.category_ids[label] == entry["category_id"]
            assert np.array_equal(mask.numpy(), theirs.annToMask(entry))
        crowds = theirs.loadAnns(theirs.getAnnIds(imgIds=number, iscrowd=True))
        assert len(target.crowd_boxes) == len(crowds)


def test_a_part_keeps_the_objects_of_its_images(tmp_path):
    root = str(write_pictures(tmp_path, 24))
    images = open_coco(root, "train")
    train, val = (images.part(part, 0.25) for part in ("train", "val"))
    assert sorted([*train, *val]) == sorted(images)
    assert len(train) > len(val) > 0
    assert not images.only
    held_out = [p for p in images if is_held_out(os.path.basename(p), 0.25)]
    assert [*val] == held_out, "below the folder of the images"
    assert len({images.fingerprint, train.fingerprint, val.fingerprint}) == 3
    of_whole = {path: index for index, path in enumerate(images)}
    for part in (train, pickle.loads(pickle.dumps(val))):
        ids = [part.image_id(index) for index in range(len(part))]
        assert part.only == tuple(ids)
        wide = part.landscape()
        for index, path in enumerate(part):
            whole = of_whole[path]
            assert int(os.path.basename(path)[:12]) == ids[index]
            assert part.size(index) == images.size(whole)
            assert wide[index] == images.landscape()[whole]
            for mine, other in zip(part.objects(index), images.objects(whole), strict=True):
                np.testing.assert_array_equal(mine, other)


def test_what_cannot_be_used_is_left_out_counted_and_named(tmp_path, caplog):
    kept = annotation(1, 5, [10, 10, 20, 20])
    entries = [
        kept,
        annotation(2, 5, [10, 10, 20, 20], category_id=4),
        annotation(18, 5, [10, 10, 20, 20], category_id=[3]),
        annotation(3, 6, [10, 10, 20, 20]),
        annotation(4, 5, [10, 10, 0, 20]),
        annotation(5, 5, [70, 10, 20, 20]),
        annotation(17, 5, [10, 10, 20, 20], area=0.0),
        annotation(6, 5, [50, 10, 20, 20]),
        annotation(7, 5, [59, 10, 1.4, 20]),
        annotation(8, 5, [10, 10, float("nan"), 20]),
        annotation(9, 5, [1, 1, 1, 1], bbox=[10, 10, 20]),
        annotation(10, 5, [10, 10, 20, 20], segmentation=[]),
        annotation(11, 5, [10, 10, 20, 20], segmentation=[[1, 2, 3, 4]]),
        annotation(12, 5, [10, 10, 20, 20], segmentation=square(1e9, 0, 5)),
        annotation(13, 5, [1, 1, 2, 2], segmentation={"size": [60, 40], "counts": [0, 2400]}),
        annotation(14, 5, [1, 1, 2, 2], segmentation={"size": [40, 60], "counts": [0, 9]}),
        annotation(15, 5, [1, 1, 2, 2], segmentation={"size": [40, 60], "counts": "zzz"}),
        annotation(16, 9, [1, 1, 9, 9], iscrowd=1),
    ]
    with caplog.at_level(logging.INFO, "fd_large"):
        opened = open_coco(str(write_set(tmp_path, entries, sizes=SIZES)), "train")
    assert len(opened) == 1  # image 9 has but a crowd
    np.testing.assert_array_equal(
        opened.objects(0).boxes, [[10, 10, 30, 30], [50, 10, 60, 30], [59, 10, 60, 30]]
    )
    lines = opened.findings.lines()
    for start, names in (
        ("2 objects of a category", "2 of 4, 18 of [3]"),
        ("1 objects of an image", "3"),
        ("3 objects without area", "4, 5, 17"),
        ("1 boxes that leave", "6"),
        ("2 objects whose box", "8, 9"),
        ("6 objects without a usable", "10 (none), 11 (no polygon of at least three points), 12"),
        ("1 images without an object", "000000000009.png"),
    ):
        line = next(line for line in lines if line.startswith(start))
        assert f": {names}" in line
    assert len(lines) == 7
    assert len(caplog.records) == 1
    assert all(line in caplog.text for line in lines)


def test_pictures_without_objects_stay_for_evaluation(tmp_path):
    entries = [annotation(1, 9, [1, 1, 9, 9], iscrowd=1)]
    opened = open_coco(str(write_set(tmp_path, entries, sizes=SIZES, split="val")), "val")
    assert [len(opened.objects(index).boxes) for index in range(2)] == [0, 0]
    assert [len(opened.objects(index).crowd_boxes) for index in range(2)] == [0, 1]


def test_labels_count_categories_by_rising_id_whatever_their_order(tmp_path):
    entries = [annotation(1, 5, [1, 1, 9, 9], category_id=7)]
    root = write_set(tmp_path, entries, sizes=SIZES)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["categories"].reverse()
    path.write_text(json.dumps(content))
    opened = open_coco(str(root), "train")
    assert opened.category_ids == (3, 7, 90)
    assert opened.category_names == ("cat", "dog", "brush")
    assert opened.objects(0).labels.tolist() == [1]


def test_run_lengths_compressed_and_not_are_one_mask(tmp_path):
    expected = np.zeros((40, 60), dtype=np.uint8)
    expected[3:9, 4:8] = 1
    packed = masks.encode(expected[None])[0]
    flat = expected.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    plain = np.diff([0, *edges, flat.size]).tolist()
    entries = [
        annotation(1, 5, [4, 3, 4, 6], segmentation=packed),
        annotation(2, 5, [4, 3, 4, 6], segmentation={"size": [40, 60], "counts": plain}),
    ]
    opened = open_coco(str(write_set(tmp_path, entries, sizes={5: (40, 60)})), "train")
    for mask in opened.target(0).masks:
        np.testing.assert_array_equal(mask, expected)


def test_missing_pictures_are_left_out_of_training_and_refused_in_evaluation(tmp_path):
    entries = [annotation(1, 5, [1, 1, 9, 9]), annotation(2, 9, [1, 1, 9, 9])]
    for split in ("train", "val"):
        write_set(tmp_path, entries, sizes=SIZES, split=split, missing=(9,))
    opened = open_coco(str(tmp_path), "train")
    assert [opened.image_id(index) for index in range(len(opened))] == [5]
    assert "1 images whose file is missing" in opened.findings.lines()[0]
    with pytest.raises(DataError, match=r"got 1 .*000000000009\.png"):
        open_coco(str(tmp_path), "val")
    shutil.rmtree(tmp_path / "train2017")
    with pytest.raises(DataError, match="got 2 "):
        open_coco(str(tmp_path), "train")


def test_objects365_has_folders_in_its_names_and_no_masks(tmp_path):
    entries = [annotation(1, 5, [1, 1, 9, 9]), annotation(2, 9, [1, 1, 9, 9])]
    for entry in entries:
        del entry["segmentation"]
    write_set(tmp_path, entries, sizes=SIZES)
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    path.unlink()
    for number, image in enumerate(content["images"]):
        patch = tmp_path / "train" / f"patch{number}"
        patch.mkdir(parents=True)
        shutil.move(tmp_path / "train2017" / image["file_name"], patch)
        image["file_name"] = f"images/v1/patch{number}/{image['file_name']}"
    (path.parent / "zhiyuan_objv2_train.json").write_text(json.dumps(content))
    opened = open_coco(str(tmp_path), "train")
    assert len(opened) == 2
    assert not opened.has_masks
    assert opened[1] == str(tmp_path / "train" / "patch1" / "000000000009.png")
    assert opened.read(1)[:4] == b"\x89PNG"
    assert opened.target(0).masks.shape == (1, 0, 0)


def test_lvis_names_images_by_their_address(tmp_path):
    write_set(tmp_path, [annotation(1, 5, [1, 1, 9, 9])], sizes=SIZES)
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    path.unlink()
    for image in content["images"]:
        image["coco_url"] = f"http://images.example.org/train2017/{image.pop('file_name')}"
    # The images of its val split lie in both folders of COCO.
    (path.parent / "lvis_v1_val.json").write_text(json.dumps(content))
    opened = open_coco(str(tmp_path), "val")
    assert opened[0] == str(tmp_path / "train2017" / "000000000005.png")
    assert opened.target(0).masks.shape == (1, 40, 60)


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    write_set(tmp_path, [annotation(1, 5, [1, 1, 9, 9])], sizes={5: (40, 60)})
    (tmp_path / "outside.png").write_bytes(b"")
    path = tmp_path / "annotations" / "instances_train2017.json"
    text = path.read_text()
    outside = str(tmp_path / "outside.png")
    for name in ("../outside.png", outside, f"/{outside}", "a/../../outside.png", "\\u0000"):
        path.write_text(text.replace("000000000005.png", name))
        with pytest.raises(DataError, match="without a file"):
            open_coco(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "without 'file_name'"),
        ('{"images": [], "annotations": [3], "categories": []}', "without image_id"),
        ('{"images": [], "annotations": [{"image_id": []}], "categories": []}', "without image_id"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"},'
            ' {"id": 1, "name": "b"}]}',
            "with the same id",
        ),
    ],
)
def test_a_file_that_is_not_cocos_is_refused_with_a_remedy(tmp_path, content, message):
    write_set(tmp_path, [], sizes={})
    (tmp_path / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(DataError, match=f"{message}.*[sS]et --data.root"):
        open_coco(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("part", "field", "number"),
    [
        ("images", "id", "Infinity"),
        ("images", "id", 2**70),
        ("images", "height", "Infinity"),
        ("images", "height", 2**40),
        ("images", "width", "NaN"),
        ("images", "width", -3),
        ("categories", "id", "Infinity"),
        ("categories", "id", 2**70),
    ],
)
def test_numbers_that_nothing_has_are_refused_in_a_sentence(tmp_path, part, field, number):
    write_set(tmp_path, [annotation(1, 5, [1, 1, 9, 9])], sizes=SIZES)
    path = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content[part][0][field] = "THE NUMBER"
    path.write_text(json.dumps(content).replace('"THE NUMBER"', str(number)))
    with pytest.raises(DataError, match=r"^annotations: .*--data\.root"):
        open_coco(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bbox", [1, 1, 10**400, 9]),
        ("bbox", [-(10**400), 1, 5, 9]),
        ("segmentation", [[10**400, 1, 5, 1, 5, 5]]),
        ("segmentation", {"size": [40, 60], "counts": [2**70]}),
        ("category_id", 2**70),
        ("image_id", 2**70),
    ],
)
def test_objects_of_such_numbers_are_left_out_and_counted(tmp_path, field, value):
    entries = [annotation(1, 5, [1, 1, 9, 9]), annotation(2, 5, [1, 1, 9, 9], **{field: value})]
    opened = open_coco(str(write_set(tmp_path, entries, sizes=SIZES)), "train")
    assert len(opened.objects(0).boxes) == 1
    assert sum(opened.findings.counts.values()) >= 1


def test_a_folder_without_the_split_is_refused(coco_tiny):
    with pytest.raises(DataError, match=r"'test'.*instances_test2017"):
        open_coco(str(coco_tiny), "test")


def test_the_set_survives_pickling_and_its_fingerprint_tells_other_objects(tmp_path):
    entries = [annotation(1, 5, [1, 1, 9, 9])]
    first = open_coco(str(write_set(tmp_path / "a", entries, sizes=SIZES)), "train")
    copy = pickle.loads(pickle.dumps(first))
    assert copy.fingerprint == first.fingerprint
    np.testing.assert_array_equal(copy.target(0).masks, first.target(0).masks)
    entries[0]["bbox"][2] = 8
    other = open_coco(str(write_set(tmp_path / "b", entries, sizes=SIZES)), "train")
    assert other.fingerprint != first.fingerprint


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    for name in [*sys.modules]:
        if name.startswith("faster_coco_eval"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"fd_large\[detection\]"):
        open_coco(str(tmp_path), "train")


def test_reading_takes_a_fraction_of_the_memory_of_plain_json(tmp_path):
    """On every rank of a node at once: polygons are most of COCO's training file."""
    numbers = [round(number * 1.37 % 40, 2) for number in range(200)]
    objects = [annotation(i, 1, [4, 4, 20, 20], segmentation=[numbers]) for i in range(1, 300)]
    root = write_set(tmp_path, objects, sizes={1: (40, 40)})
    path = root / "annotations/instances_train2017.json"
    peaks = []
    for read in (lambda: json.loads(path.read_text()), lambda: open_coco(str(root), "train")):
        tracemalloc.start()
        read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.7 * peaks[0]


def write_objects(root, images):
    sizes = {number: (40, 60) for number in range(1, images + 1)}
    entries = [annotation(number, number, [1, 1, 9, 9]) for number in sizes]
    write_set(root, entries, sizes=sizes)
    for path in (root / "annotations/instances_train2017.json", root / "train2017"):
        os.utime(path, (1e9, 1e9))
    return root


@pytest.fixture
def reads(monkeypatch):
    """A line for each time that annotations are parsed."""
    done = []
    read = annotations_module.read_objects
    monkeypatch.setattr(
        annotations_module, "read_objects", lambda *a, **k: done.append(1) or read(*a, **k)
    )
    return done


def test_annotations_are_parsed_again_only_if_they_or_the_images_changed(
    tmp_path, monkeypatch, reads
):
    monkeypatch.setattr(listing, "CACHED_FROM", 1)
    root = write_objects(tmp_path, 3)
    first, second = open_coco(str(root), "train"), open_coco(str(root), "train")
    assert len(reads) == 1
    assert second.fingerprint == first.fingerprint
    assert second.summary() == first.summary()
    for index in range(3):
        for one, other in zip(first.objects(index), second.objects(index), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(pickle.dumps(second)) < 1000
    (root / "train2017/000000000002.png").unlink()
    assert len(open_coco(str(root), "train")) == 2
    shutil.rmtree(root / "train2017")
    with pytest.raises(DataError, match="got 3 "):
        open_coco(str(root), "train")
    write_set(tmp_path / "again", [], sizes={1: (40, 60)})
    (tmp_path / "again/train2017").rename(root / "train2017")
    assert len(open_coco(str(root), "train")) == 1
    path = root / "annotations/instances_train2017.json"
    path.write_text(path.read_text().replace('"dog"', '"cow"'))
    assert open_coco(str(root), "train").category_names[1] == "cow"


@pytest.mark.parametrize("kept", [True, False])
def test_one_rank_parses_and_only_it_looks_at_the_files(tmp_path, monkeypatch, reads, kept):
    monkeypatch.setattr(listing, "CACHED_FROM", 1 if kept else 10**9)
    others = []
    for images in (2, 20):
        root = write_objects(tmp_path / str(images), images)
        world = World(monkeypatch, 4, below=(root,))
        reads.clear()
        found = world.run(partial(meeting.meet, partial(open_coco, str(root), "train")))
        assert len(reads) == 1
        assert len({opened.fingerprint for opened in found}) == 1
        assert [len(opened) for opened in found] == [images] * 4
        np.testing.assert_array_equal(found[3].objects(1).boxes, found[0].objects(1).boxes)
        assert world.done[0]["listdir"] == 1
        assert {done["listdir"] + done["open"] for done in world.done[1:]} == {0}
        others.append(world.done[1:])
    assert others[0] == others[1]


def test_the_fingerprint_is_that_of_the_first_release(coco_tiny):
    """A run that goes on compares it with its checkpoint's."""
    assert open_coco(str(coco_tiny), "val").fingerprint.startswith("ccb86f270203403d")
