from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fd_large.data.folder import ImageFolder
from fd_large.data.loader import MAX_TRIES, Batch, ViewBatches, build_loader
from fd_large.data.sampler import Portion, epoch_order
from fd_large.data.views import FixedViews, ViewSettings
from fd_large.errors import ConfigError, DataError

VIEWS = ViewSettings(32, 0.3)
SETTINGS = dict(
    seed=1, epoch=3, first_update=0, global_batch_size=12, micro_batch_size=2, rank=0,
    world_size=1, workers=0,
)  # fmt: skip


def loader(source, views=VIEWS, **changes) -> DataLoader:
    given = {**SETTINGS, **changes}
    return build_loader(
        ViewBatches(source, views, given["seed"], given["epoch"]),
        len(source),
        Portion(*(given[name] for name in Portion._fields)),
        global_batch_size=given["global_batch_size"],
        workers=given["workers"],
    )


def load(source, views=VIEWS, **changes) -> list[Batch]:
    return list(loader(source, views, **changes))


def by_position(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and indices in the order of their positions, which must be 0, 1, 2, ..."""
    positions = torch.cat([batch.positions for batch in batches])
    order = positions.argsort()
    assert torch.equal(positions[order], torch.arange(len(positions)))
    images, indices = (
        torch.cat([getattr(batch, name) for batch in batches])[order]
        for name in ("images", "indices")
    )
    return images, indices


def check_pixels_over_ranks_and_workers(folder: ImageFolder) -> None:
    images, indices = by_position(load(folder))
    assert images.shape == (24, 3, 32, 32)
    assert len(indices.unique()) == 24  # none twice
    for world_size, micro_batch_size, workers in ((1, 6, 2), (2, 3, 0), (2, 2, 2), (3, 4, 0)):
        batches = [
            batch
            for rank in range(world_size)
            for batch in load(
                folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                workers=workers,
            )
        ]
        their_images, their_indices = by_position(batches)
        assert torch.equal(their_indices, indices)
        assert torch.equal(their_images, images)


def test_pixels_do_not_depend_on_ranks_and_workers(picture_folder):
    check_pixels_over_ranks_and_workers(ImageFolder(picture_folder))


def test_pixels_of_photographs_do_not_depend_on_ranks_and_workers(photo_folder):
    check_pixels_over_ranks_and_workers(ImageFolder(photo_folder))


def test_a_batch_says_where_it_belongs(picture_folder):
    batches = load(ImageFolder(picture_folder), micro_batch_size=4)
    assert len(batches) == 6  # 2 steps of 3 micro batches; 2 of 26 images are left over
    for number, batch in enumerate(batches):
        assert batch.epoch == 3
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.positions.tolist() == list(range(4 * number, 4 * number + 4))
        assert batch.indices.dtype == torch.int64


def test_length_counts_micro_batches(picture_folder):
    folder = ImageFolder(picture_folder)
    for changes, expected in (({}, 12), ({"world_size": 3}, 4), ({"first_update": 1}, 6)):
        batches = loader(folder, **changes)
        assert len(batches) == len(list(batches)) == expected


def test_processes_that_take_the_machine_down_are_not_started(picture_folder):
    with pytest.raises(ConfigError, match=r"data\.workers: .*got 100000, "):
        loader(ImageFolder(picture_folder), workers=100_000)


def test_a_resumed_epoch_goes_on_with_the_same_batches(picture_folder):
    folder = ImageFolder(picture_folder)
    whole, rest = load(folder), load(folder, first_update=1, workers=2)
    assert len(rest) == 6
    for expected, batch in zip(whole[6:], rest, strict=True):
        assert torch.equal(batch.positions, expected.positions)
        assert torch.equal(batch.images, expected.images)
    assert load(folder, first_update=2) == []


def test_epochs_and_seeds_change_order_and_views(picture_folder):
    folder = ImageFolder(picture_folder)
    images, indices = by_position(load(folder))
    for changes in ({"epoch": 4}, {"seed": 2}):
        other_images, other_indices = by_position(load(folder, **changes))
        assert not torch.equal(other_indices, indices)
        sample = int(indices[0])
        place = (other_indices == sample).nonzero()
        if len(place):  # the same image, another crop
            assert not torch.equal(other_images[place[0, 0]], images[0])


def test_workers_may_be_spawned(picture_folder):
    folder = ImageFolder(picture_folder)
    batches = loader(folder, workers=1, micro_batch_size=12)
    batches.multiprocessing_context = "spawn"
    images, _ = by_position(list(batches))
    assert torch.equal(images, by_position(load(folder))[0])


def test_loading_does_not_touch_torchs_and_numpys_generators(picture_folder):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(ImageFolder(picture_folder))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_only_the_images_go_to_the_device(picture_folder):
    batch = load(ImageFolder(picture_folder))[0]
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.positions is batch.positions
    assert moved.epoch == batch.epoch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_pinned_for_a_gpu(picture_folder, workers):
    expected = None
    for batch in load(ImageFolder(picture_folder), workers=workers):
        assert batch.images.is_pinned()
        expected = batch.images
        assert torch.equal(batch.to("cuda").images.cpu(), expected)


@pytest.fixture
def damaged_folder(tmp_path, picture_folder):
    """24 files, of which three are no images."""
    source = ImageFolder(picture_folder)
    for number in range(24):
        (tmp_path / f"{number:02}.png").write_bytes(source.read(number))
    for number in (3, 11, 17):
        (tmp_path / f"{number:02}.png").write_bytes(b"damaged")
    return tmp_path


def test_a_damaged_picture_is_replaced_and_told_the_same_everywhere(damaged_folder):
    folder = ImageFolder(damaged_folder)
    whole = load(folder)
    images, indices = by_position(whole)
    bad = sorted(message for batch in whole for message in batch.bad)
    assert len(bad) >= 3
    assert {message.partition(": ")[0][-6:] for message in bad} == {"03.png", "11.png", "17.png"}
    assert "not an image that can be decoded" in bad[0]
    assert not set(indices.tolist()) & {3, 11, 17}
    for world_size, micro_batch_size, workers in ((1, 12, 2), (2, 3, 0), (3, 4, 1)):
        parts = [
            load(
                folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                workers=workers,
            )
            for rank in range(world_size)
        ]
        batches = [batch for part in parts for batch in part]
        their_images, their_indices = by_position(batches)
        assert torch.equal(their_indices, indices)
        assert torch.equal(their_images, images)
        assert sorted(message for batch in batches for message in batch.bad) == bad


def test_stand_ins_differ_between_places_and_epochs(damaged_folder):
    folder = ImageFolder(damaged_folder)
    chosen = set()
    for epoch in range(6):
        batches = load(folder, epoch=epoch)
        _, indices = by_position(batches)
        order = epoch_order(24, SETTINGS["seed"], epoch, np.arange(24))
        chosen |= {int(i) for i, was in zip(indices, order, strict=True) if i != was}
    assert len(chosen) > 6  # of 18 stand-ins


def test_where_nothing_can_be_used_the_run_is_told_not_hung(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"damaged")
    batches = load(ImageFolder(tmp_path))
    assert sum(len(batch.bad) for batch in batches) == 12 * MAX_TRIES
    assert not any(batch.images.any() for batch in batches)


def test_a_picture_over_the_limit_of_pixels_is_replaced(picture_folder):
    batches = load(ImageFolder(picture_folder), ViewSettings(32, 0.3, max_pixels=50 * 62))
    told = [message for batch in batches for message in batch.bad]
    assert told
    assert all("too large; got" in message for message in told)


def test_color_is_changed_by_position_alone(picture_folder):
    folder = ImageFolder(picture_folder)
    plain, _ = by_position(load(folder))
    views = ViewSettings(32, 0.3, color_jitter=0.4, grayscale_probability=0.2)
    images, _ = by_position(load(folder, views))
    others, _ = by_position(load(folder, views, micro_batch_size=6, workers=1))
    assert torch.equal(images, others)
    assert (images != plain).flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [(9, ConfigError, "does not divide"), (28, DataError, "larger than the data")],
)
def test_batches_that_cannot_be_are_refused(picture_folder, size, error, message):
    with pytest.raises(error, match=rf"batch\.global_batch_size: {message}"):
        loader(ImageFolder(picture_folder), global_batch_size=size)


def test_all_tensors_of_a_target_travel(picture_folder):
    class Objects(NamedTuple):
        boxes: list[torch.Tensor]
        names: dict[str, torch.Tensor]
        number: int

    batch = load(ImageFolder(picture_folder))[0]
    targets = Objects([torch.zeros(2)], {"a": torch.zeros(3)}, 7)
    moved = replace(batch, targets=targets).to("meta")
    assert [tensor.device.type for tensor in moved.tensors()] == ["meta"] * 3
    assert isinstance(moved.targets, Objects)
    assert moved.targets.number == 7


def by_image(batches: ViewBatches) -> dict[int, torch.Tensor]:
    """The views of an epoch in its order, by image."""
    batch = batches[np.arange(len(batches.source))]
    return dict(zip(batch.indices.tolist(), batch.images, strict=True))


def test_fixed_views_come_again_whatever_the_order(picture_folder):
    folder, fixed = ImageFolder(picture_folder), FixedViews(2, seed=7)

    def views(epoch: int, seed: int) -> dict[int, torch.Tensor]:
        return by_image(ViewBatches(folder, VIEWS, seed, epoch, fixed))

    first, again, other = views(0, seed=1), views(2, seed=5), views(1, seed=1)
    assert list(first) != list(again)
    assert sorted(first) == sorted(again) == sorted(other)
    assert all(torch.equal(first[index], again[index]) for index in first)
    assert sum(torch.equal(first[index], other[index]) for index in first) < len(first) / 2


class _Stored:
    """Beside each view stands its image's number and first pixel; image 3 has nothing."""

    def of(self, index: int, view: torch.Tensor) -> dict[str, torch.Tensor]:
        if index == 3:
            raise DataError("3: nothing is stored")
        return {"index": torch.tensor(index), "pixel": view[:, 0, 0]}

    def blank(self) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(-1), "pixel": torch.zeros(3, dtype=torch.uint8)}


def test_what_is_stored_of_views_goes_with_them(picture_folder):
    folder, fixed = ImageFolder(picture_folder), FixedViews(1, seed=0)
    batch = ViewBatches(folder, VIEWS, 1, 0, fixed, _Stored())[np.arange(len(folder))]
    assert torch.equal(batch.targets["index"], batch.indices)
    assert torch.equal(batch.targets["pixel"], batch.images[:, :, 0, 0])
    assert 3 not in batch.indices
    assert batch.bad == ("3: nothing is stored",)
    # A stand-in's view is its own.
    usual = by_image(ViewBatches(folder, VIEWS, 9, 4, fixed))
    for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
        assert torch.equal(usual[index], image)
