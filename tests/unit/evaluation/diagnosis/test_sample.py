"""Which images are looked at, and what of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from fd_large.errors import DataError
from fd_large.evaluation.diagnosis.examine import num_batches
from fd_large.evaluation.diagnosis.sample import Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one grey each."""
    for number in range(10):
        grey = torch.full((3, 8, 12), 10 * number, dtype=torch.uint8)
        write_png(grey, str(tmp_path / f"{number}.png"))
    return tmp_path


def greys(sample: Sample, batches: int) -> list[list[int]]:
    return [views.of_size[4][:, 0, 0, 0].tolist() for views in sample.batches(batches, [4, 6])]


def test_every_picture_once_in_even_batches(folder: Path) -> None:
    found = greys(Sample(str(folder), 10), 3)
    assert [len(batch) for batch in found] == [4, 3, 3]
    in_order = [grey for batch in found for grey in batch]
    assert sorted(in_order) == list(range(0, 100, 10))
    assert in_order != sorted(in_order)
    assert greys(Sample(str(folder), 10), 3) == found


def test_no_more_than_wanted_and_all_sizes(folder: Path) -> None:
    sample = Sample(str(folder), 4)
    assert len(sample) == 4
    (views,) = sample.batches(1, [4, 6])
    assert {size: tuple(images.shape) for size, images in views.of_size.items()} == {
        4: (4, 3, 4, 4),
        6: (4, 3, 6, 6),
    }


def test_a_photograph_that_is_listed_often_is_taken_once() -> None:
    assert len(Sample("builtin:photographs-held-out", 100)) == 2


def test_bad_pictures_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "3.png").write_bytes(b"no image")
    found = greys(Sample(str(folder), 10), 1)
    assert sorted(found[0]) == [g for g in range(0, 100, 10) if g != 30]
    assert "3.png" in caplog.text


def test_nothing_but_bad_pictures_is_an_error(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^data\.root: no image"):
        greys(Sample(str(folder), 10), 2)


@pytest.mark.parametrize(
    ("images", "batch_size", "expected"),
    [(64, 16, 4), (65, 16, 5), (6, 16, 1), (6, 4, 1), (9, 4, 2), (8, 2, 2), (3, 1, 1), (1, 1, 1)],
)
def test_batches_are_large_enough_for_cka(images: int, batch_size: int, expected: int) -> None:
    assert num_batches(images, batch_size) == expected
