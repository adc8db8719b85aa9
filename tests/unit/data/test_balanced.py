import numpy as np
import pytest
from pictures import write_pictures

from fd_large.data.balanced import Balanced
from fd_large.data.labelled import open_training
from fd_large.data.roots import WeightedRoot, weighted_roots
from fd_large.data.sampler import Blocks, samples_at
from fd_large.data.source import open_images
from fd_large.errors import DataError


class Numbers:
    """Images that are their own numbers, read in blocks or not."""

    def __init__(self, size, *, block=0):
        self.size, self.fingerprint, self.expected = size, f"{size}", []
        if block:
            self.blocks = Blocks(np.arange(block, size + 1, block))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return f"{self.size}/{index}"

    def read(self, index):
        return bytes([index])

    def expect(self, blocks):
        self.expected += list(blocks)


def balanced(*parts):
    return Balanced([(WeightedRoot(str(size), "", share), Numbers(size)) for size, share in parts])


@pytest.mark.parametrize("shares", [(1, 1), (2, 1, 4), (7, 3)])
def test_every_stretch_of_an_epoch_has_its_shares(shares):
    sizes = (40, 13, 25)[: len(shares)]
    source = balanced(*zip(sizes, shares, strict=True))
    images = samples_at(source, 0, 3, np.arange(len(source)))
    part = np.searchsorted(np.cumsum(sizes), images, side="right")
    for number, share in enumerate(shares):
        seen = np.concatenate([[0], (part == number).cumsum()])
        due = np.arange(len(seen)) * share / sum(shares)
        assert np.abs(seen - due).max() <= 1


def test_a_dataset_is_gone_through_whole_before_it_comes_again():
    source = balanced((30, 1), (7, 2))
    positions = np.arange(len(source))
    images = np.concatenate([samples_at(source, 5, epoch, positions) for epoch in range(6)])
    small, large = images[images >= 30], images[images < 30]
    for images, size in ((small, 7), (large, 30)):
        passes = [images[i : i + size] for i in range(0, len(images) - size + 1, size)]
        assert len(passes) > 1
        assert all(len(set(one)) == size for one in passes)
        assert any((passes[0] != one).any() for one in passes[1:])


def test_what_stands_at_a_position_follows_from_it_alone():
    source = balanced((3, 9), (25, 1))
    whole = samples_at(source, 1, 2, np.arange(28))
    some = np.array([27, 3, 14, 4])
    assert (samples_at(source, 1, 2, some) == whole[some]).all()
    assert (samples_at(source, 2, 2, some) != whole[some]).any()
    # Evaluations take an epoch that no training reaches.
    last = samples_at(source, 1, 2**31 - 1, np.arange(28))
    assert last.min() >= 0
    assert last.max() < 28
    assert 0 <= source.blocks.stand_in(1, 2**31 - 1, 5, 0.5) < 28


def test_a_stand_in_is_of_the_same_dataset_and_blocks_are_told_in_time():
    plain, packed = Numbers(10), Numbers(40, block=4)
    parts = [WeightedRoot("a", "", 1), WeightedRoot("b", "", 1)]
    source = Balanced(list(zip(parts, (plain, packed), strict=True)))
    images = samples_at(source, 0, 0, np.arange(50))
    assert not plain.expected
    assert {int(image - 10) // 4 for image in images if image >= 10} <= set(packed.expected)
    for position in (0, 1, 48, 49):
        other = source.blocks.stand_in(0, 0, position, 0.99)
        assert (other < 10) == (images[position] < 10)
    assert [source[0], source[9], source[10], source[49]] == ["10/0", "10/9", "40/0", "40/39"]


def test_datasets_are_opened_by_weight_with_their_training_parts(tmp_path):
    write_pictures(tmp_path / "a" / "train" / "x", 3)
    write_pictures(tmp_path / "a" / "val" / "x", 2)
    write_pictures(tmp_path / "b", 4)
    root = f"0.25 {tmp_path}/a + 0.75 other={tmp_path}/b/"
    assert [part[::2] for part in weighted_roots(root)] == [("a", 1), ("other", 3)]
    images = open_training(root)
    assert (len(images), len(open_images(root))) == (7, 9)
    assert "/a/train/" in images[2]
    assert images.read(3) == (tmp_path / "b" / "000.png").read_bytes()
    again = open_training(root.replace("0.25", "0.5"))
    assert again.fingerprint != images.fingerprint


@pytest.mark.parametrize(
    "root",
    ["0.5 /a + /b", "0.5 /a + 0 /b", "0.5 /x/a + 0.5 /y/a", "0.5000001 /a + 0.4999999 /b"],
)
def test_sums_that_are_none_are_refused(root):
    with pytest.raises(DataError, match=r"data\.root"):
        weighted_roots(root)


@pytest.mark.parametrize("root", ["", "/data/a + b", "builtin:photographs", "/data/0.5 a"])
def test_what_is_no_sum_is_left_to_others(root):
    assert weighted_roots(root) == ()
