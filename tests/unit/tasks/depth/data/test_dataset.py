from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from depth_images import image_and_depths, save, write_images, write_kitti
from PIL import Image

from fd_large.errors import DataError
from fd_large.tasks.depth.data.dataset import open_depth

FOLDERS = {
    "kinds": ("images/train/a/{}.jpg", "depths/train/a/{}.png"),
    "splits": ("train/images/{}.jpg", "train/depths/{}.png"),
    "together": ("train/a/{}.jpg", "train/a/{}.png"),
}


@pytest.fixture(scope="module")
def nyu(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("nyu"), 3)


def test_the_lists_of_nyu_name_images_and_depths(nyu):
    for split, first in (("train", 0), ("val", 100)):
        images = open_depth(str(nyu), split)
        assert len(images) == 3
        for index in range(3):
            image, depths = images.sample(index)
            expected = image_and_depths(first + index)
            assert Path(images[index]).stem.endswith(f"{index:05d}")
            np.testing.assert_allclose(depths, expected[1], atol=0.00051)
            assert (depths[:3] == 0).all()
            assert depths.dtype == np.float32
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected[0]).mean() < 3
    assert open_depth(str(nyu), "train").fingerprint != open_depth(str(nyu), "val").fingerprint


def test_a_part_of_a_list_keeps_the_depths_of_its_images(tmp_path):
    images = open_depth(str(write_images(tmp_path, 12)), "train")
    parts = [images.part(part, 0.25) for part in ("train", "val")]
    assert sorted(path for part in parts for path in part) == sorted(images)
    assert len(parts[0]) > len(parts[1]) > 0
    for part in parts:
        for index in range(len(part)):
            expected = image_and_depths(int(Path(part[index]).stem[-5:]))
            np.testing.assert_allclose(part.truth(index), expected[1], atol=0.00051)


def test_a_list_elsewhere_may_name_a_part(nyu, tmp_path):
    lines = (nyu / "train_list.txt").read_text().splitlines()
    (tmp_path / "mine.txt").write_text(f"\n{lines[2]}\n")
    images = open_depth(str(nyu), "train", list_file=str(tmp_path / "mine.txt"))
    assert len(images) == 1
    assert images[0].endswith("kitchen_0001a/rgb_00002.jpg")


def test_no_line_leads_out_of_the_folder(nyu, tmp_path):
    line = (nyu / "train_list.txt").read_text().splitlines()[0].split()
    for name in (f"../{nyu.name}{line[0]}", f"/a/../..{nyu}{line[0]}", f"/{nyu}{line[0]}"):
        (tmp_path / "mine.txt").write_text(f"{name} {line[1]}\n")
        with pytest.raises(DataError, match="are missing"):
            open_depth(str(nyu), "train", list_file=str(tmp_path / "mine.txt"))


def test_images_of_kitti_without_truth_are_left_out_and_all_are_cut(tmp_path):
    root = str(write_kitti(tmp_path))
    options = {"depth_scale": 256.0, "bottom_crop": (70, 240)}
    assert len(open_depth(root, "train", **options)) == 4
    images = open_depth(root, "val", **options)
    assert [Path(images[i]).stem[-1] for i in range(3)] == ["0", "2", "3"]
    image, depths = images.sample(1)
    assert image.shape == (3, 70, 240)
    np.testing.assert_allclose(depths, image_and_depths(2, 75, 250)[1][5:, 5:245], atol=0.002)
    with pytest.raises(DataError, match=r"bottom_crop; got 250 x 75 .* 240 x 76"):
        open_depth(root, "val", depth_scale=256.0, bottom_crop=(76, 240)).sample(0)


@pytest.mark.parametrize("layout", FOLDERS)
def test_folders_pair_images_with_depths(layout, tmp_path):
    for number in range(2):
        names = (tmp_path / name.format(f"image_{number}") for name in FOLDERS[layout])
        save(*image_and_depths(number), tuple(names), 500)
    images = open_depth(str(tmp_path), "train", depth_scale=500)
    assert [Path(images[i]).name for i in range(2)] == ["image_0.jpg", "image_1.jpg"]
    np.testing.assert_allclose(images.truth(1), image_and_depths(1)[1], atol=0.0011)


def test_files_without_any_depth_are_refused(tmp_path):
    for number in range(2):
        names = (tmp_path / name.format(f"image_{number}") for name in FOLDERS["kinds"])
        image, depths = image_and_depths(number)
        save(image, 0 * depths, tuple(names), 500)
    with pytest.raises(DataError, match=r"got 0 "):
        open_depth(str(tmp_path), "train", depth_scale=500)


def test_mistakes_are_named_all_at_once(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*'val'.*test_list\.txt.*task\.depth\.val_"):
        open_depth(str(tmp_path), "val")
    with pytest.raises(DataError, match=r"task\.depth\.train_list: "):
        open_depth(str(tmp_path), "train", list_file=str(tmp_path / "none.txt"))
    root = write_images(tmp_path / "nyu", 3)
    listed = root / "train_list.txt"
    (root / "kitchen_0001a/rgb_00000.jpg").unlink()
    (root / "office_0001a/sync_depth_00001.png").unlink()
    with pytest.raises(DataError, match=r"missing.*2 of 6 \(kitchen_.*rgb_00000.*sync_depth_00001"):
        open_depth(str(root), "train")
    for text, message in (("/a.jpg\n", "'/a.jpg' as line 1"), ("\n", "an empty")):
        listed.write_text(text)
        with pytest.raises(DataError, match=message):
            open_depth(str(root), "train")
    # An image of 8 bits, as a picture of a depth is, holds no metres.
    Image.fromarray(np.zeros((72, 96), np.uint8)).save(
        root / "official_splits/test/kitchen/sync_depth_00000.png"
    )
    with pytest.raises(DataError, match="mode L"):
        open_depth(str(root), "val")


def test_depths_of_other_units_are_refused_and_invalid_ones_unknown(nyu):
    options = {"limits": (0.001, 10.0)}
    open_depth(str(nyu), "train", **options)
    with pytest.raises(DataError, match=r"data\.root: .* 4\d.* m .* 10\.0 m"):
        open_depth(str(nyu), "train", depth_scale=100.0, **options)
    images = open_depth(str(nyu), "train", valid_range=(2.0, 4.5), **options)
    depths, expected = images.truth(1), image_and_depths(1)[1]
    valid = (expected > 2.001) & (expected <= 4.499)
    np.testing.assert_allclose(depths[valid], expected[valid], atol=0.00051)
    assert not depths[(expected < 1.999) | (expected > 4.501)].any()


def test_an_image_without_any_depth_is_a_sample(tmp_path):
    images = open_depth(str(write_images(tmp_path, 2, without=(1,))), "train")
    image, depths = images.sample(1)
    assert not depths.any()
    assert image.float().std() > 1
    assert torch.equal(image, images.sample(1)[0])
