from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from coco import annotation, write_set
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fd_large.data.loader import MAX_TRIES, Batch
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import Portion
from fd_large.errors import ConfigError, DataError
from fd_large.tasks.detection.data.annotations import open_coco
from fd_large.tasks.detection.data.loader import (
    BLACK_SIDE,
    build_evaluation_loader,
    build_training_loader,
    grouped_order,
    read_image,
)
from fd_large.tasks.detection.data.target import make_target
from fd_large.tasks.detection.data.views import LargeScaleJitter, ShortestEdge

SETTINGS = dict(
    seed=1, epoch=3, first_update=0, global_batch_size=12, micro_batch_size=2, rank=0,
    world_size=1, workers=0,
)  # fmt: skip
JITTERS = [LargeScaleJitter(64), ShortestEdge(40, 60, 90)]
EVALUATION = dict(sides=[(48, 80)], batch_size=4, workers=0)


@pytest.fixture(scope="module")
def train(coco_tiny):
    return open_coco(str(coco_tiny), "train")


@pytest.fixture(scope="module")
def val(coco_tiny):
    return open_coco(str(coco_tiny), "val")


def load(source, jitter, **changes) -> list[Batch]:
    given = {**SETTINGS, **changes}
    portion = Portion(*(given.pop(name) for name in Portion._fields))
    return list(build_training_loader(source, jitter, portion, **given))


def samples(batches: list[Batch]) -> dict[int, tuple[torch.Tensor, ...]]:
    """By position: index, unpadded image, and the parts of the target."""
    found = {}
    for batch in batches:
        for place, position in enumerate(batch.positions.tolist()):
            height, width = batch.targets.sizes[place].tolist()
            target = batch.targets.targets[place]
            assert position not in found
            assert not batch.images[place, :, height:].any()
            assert not batch.images[place, :, :, width:].any()
            assert not target.masks[:, height:].any()
            found[position] = (
                batch.indices[place],
                batch.images[place, :, :height, :width],
                target.boxes,
                target.labels,
                target.masks[:, :height, :width],
                target.crowd_boxes,
                torch.tensor(target.image_id),
            )
    return found


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b)
        for position in first
        for a, b in zip(first[position], second[position], strict=True)
    )


@pytest.mark.parametrize(
    ("jitter", "copied"),
    [(JITTERS[0], 0.5), (JITTERS[1], 0)],
    ids=["fixed crop, copies", "own aspect"],
)
def test_samples_do_not_depend_on_ranks_workers_and_resuming(train, jitter, copied):
    of_run = partial(load, train, jitter, copy_probability=copied)
    whole = samples(of_run())
    assert sorted(whole) == list(range(24))
    for world_size, micro_batch_size, workers in ((1, 6, 2), (2, 3, 0), (3, 4, 0)):
        batches = [
            batch
            for rank in range(world_size)
            for batch in of_run(
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                workers=workers,
            )
        ]
        assert same(samples(batches), whole)
    rest = samples(of_run(first_update=1))
    assert sorted(rest) == list(range(12, 24))
    assert same(rest, {position: whole[position] for position in rest})
    for changes in ({"epoch": 4}, {"seed": 2}):
        assert not same(samples(of_run(**changes)), whole)


def test_objects_are_copied_in_some_images(train):
    still = LargeScaleJitter(64, min_scale=1, max_scale=1)
    plain, copied = (
        samples(load(train, still, copy_probability=probability)) for probability in (0, 0.5)
    )
    changed = [not torch.equal(plain[place][1], copied[place][1]) for place in plain]
    assert 6 <= sum(changed) <= 18
    for place, is_changed in enumerate(changed):
        assert torch.equal(plain[place][2], copied[place][2]) != is_changed


def test_a_batch_says_what_it_holds(train):
    for jitter in JITTERS:
        for batch in load(train, jitter, micro_batch_size=4):
            targets = batch.targets
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous()
            assert (targets.epoch, targets.positions.tolist()) == (3, batch.positions.tolist())
            assert targets.sizes.dtype == torch.int64
            for index, target in zip(batch.indices.tolist(), targets.targets, strict=True):
                assert target.image_id == train.image_id(index)
                assert target.masks.shape == (len(target.boxes), *batch.images.shape[-2:])
                assert set(target.masks.unique().tolist()) <= {0, 1}
                assert len(target.labels) == len(target.boxes)
            if jitter.canvas:
                assert batch.images.shape[-2:] == jitter.canvas
            else:
                assert batch.images.shape[-2:] == tuple(targets.sizes.amax(0).tolist())


def test_boxes_and_masks_lie_where_the_objects_are(train):
    apart = []
    for target in load(train, LargeScaleJitter(320), micro_batch_size=12)[0].targets.targets:
        for box, mask in zip(target.boxes.numpy(), target.masks.numpy(), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            apart.append(np.abs(box - bounds).max())
    assert len(apart) > 80
    assert np.quantile(apart, 0.9) < 1.5


def test_global_batches_that_keep_their_aspect_have_one_orientation(train):
    for update, batch in enumerate(
        load(train, JITTERS[1], micro_batch_size=4, global_batch_size=4)
    ):
        wide = train.landscape()[batch.indices.numpy()]
        assert len(set(wide.tolist())) == 1, update


def test_a_bad_picture_is_replaced_alike_on_all_ranks(tmp_path):
    sizes = {number: (40, 60) for number in range(1, 13)}
    entries = [annotation(number, number, [5, 5, 20, 20]) for number in sizes]
    source = open_coco(str(write_set(tmp_path, entries, sizes=sizes)), "train")
    for index in range(0, 12, 3):
        with open(source[index], "r+b") as file:
            file.truncate(40)
    jitter = LargeScaleJitter(32, min_scale=1.0)
    whole = load(source, jitter)
    told = [text for batch in whole for text in batch.bad]
    assert len(told) >= 4
    assert all(source[index] in " ".join(told) for index in range(0, 12, 3))
    assert {index % 3 for batch in whole for index in batch.indices.tolist()} == {1, 2}
    halves = [b for rank in range(2) for b in load(source, jitter, rank=rank, world_size=2)]
    assert same(samples(halves), samples(whole))


def test_where_all_pictures_are_bad_the_places_stay_black(tmp_path):
    entries = [annotation(number, number, [5, 5, 20, 20]) for number in (1, 2)]
    root = write_set(tmp_path, entries, sizes={1: (40, 60), 2: (60, 40)})
    source = open_coco(str(root), "train")
    for index in range(2):
        with open(source[index], "wb"):
            pass
    for jitter in JITTERS:
        (batch,) = load(source, jitter, global_batch_size=2)
        assert not batch.images.any()
        assert batch.targets.sizes.tolist() == [[BLACK_SIDE, BLACK_SIDE]] * 2
        assert len(batch.bad) == 2 * MAX_TRIES
        for target in batch.targets.targets:
            assert target.boxes.shape == (0, 4)
            assert target.masks.shape == (0, *batch.images.shape[-2:])


def test_a_picture_of_another_size_than_its_annotations_is_bad(tmp_path):
    root = write_set(tmp_path, [annotation(1, 1, [5, 5, 20, 20])], sizes={1: (40, 60)})
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"height": 40', '"height": 41'))
    source = open_coco(str(root), "train")
    with pytest.raises(DataError, match=r"60 x 40 .*60 x 41"):
        read_image(source, 0)


def test_a_set_without_masks_loads(tmp_path):
    entries = [annotation(number, number, [5, 5, 20, 20]) for number in (1, 2)]
    for entry in entries:
        del entry["segmentation"]
    source = open_coco(str(write_set(tmp_path, entries, sizes={1: (40, 60), 2: (50, 60)})), "train")
    for jitter in (LargeScaleJitter(32, min_scale=1.0), JITTERS[1]):
        (batch,) = load(source, jitter, global_batch_size=2)
        for target in batch.targets.targets:
            assert target.masks.shape == (len(target.boxes), 0, 0)


def test_semantic_maps_pass_through_the_view_of_their_image(tmp_path):
    write_set(tmp_path, [annotation(1, 1, [8, 16, 20, 30])], sizes={1: (64, 64), 2: (64, 64)})
    folder = tmp_path / "stuffthingmaps" / "train2017"
    classes = np.full((64, 64), 255, dtype=np.uint8)
    classes[:40], classes[16:46, 8:28] = 2, 5
    source = open_coco(str(tmp_path), "train")
    with pytest.raises(DataError, match=r"^data\.root: .*stuffthingmaps"):
        source.check_semantic(6, where="data.root")
    folder.mkdir(parents=True)
    Image.fromarray(classes).save(folder / f"{1:012}.png")
    source.check_semantic(6, where="data.root")
    source, still = (
        open_coco(str(tmp_path), "train"),
        LargeScaleJitter(64, min_scale=1, max_scale=1),
    )
    few = dict(global_batch_size=1, micro_batch_size=1, semantic_classes=6)
    target = load(source, still, **few)[0].targets.targets[0]
    assert set(target.semantic.unique().tolist()) == {2, 5, 255}
    assert torch.equal(target.semantic == 5, target.masks[0, ::8, ::8] == 1)
    with pytest.raises(DataError, match=r"000001\.png.*up to 5.*semantic_classes"):
        source.semantic(0, 5)
    (folder / f"{1:012}.png").unlink()
    with pytest.raises(DataError, match="stuffthingmaps"):
        source.semantic(0, 6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_shows_every_picture_once_on_any_number_of_ranks(val, world_size):
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = build_evaluation_loader(val, rank=rank, world_size=world_size, **EVALUATION)
        batches = list(loader)
        lengths.add(len(batches))
        assert len(loader) == len(batches)
        for batch in batches:
            assert [len(images) for images in batch.images] == [4]
            assert batch.bad == ()
            seen += batch.indices[batch.weights == 1].tolist()
    assert len(lengths) == 1
    assert sorted(seen) == list(range(54))


def test_evaluation_resizes_the_whole_picture_to_each_scale(val):
    sides = [(48, 80), (30, 60)]
    for batch in build_evaluation_loader(
        val, rank=0, world_size=1, sides=sides, batch_size=4, workers=0
    ):
        assert len(batch.images) == len(batch.sizes) == 2
        for images, sizes, (short, long) in zip(batch.images, batch.sizes, sides, strict=True):
            for place, index in enumerate(batch.indices.tolist()):
                height, width = sizes[place].tolist()
                assert batch.original_sizes[place].tolist() == list(val.size(index))
                assert min(height, width) == short or max(height, width) == long
                assert max(height, width) <= long
                if batch.weights[place]:
                    assert images[place, :, :height, :width].any()
                assert not images[place, :, height:].any()


def test_evaluation_goes_on_past_a_picture_that_cannot_be_read_and_tells_it(tmp_path):
    sizes = {number: (40, 60) for number in range(1, 6)}
    root = write_set(tmp_path, [annotation(1, 1, [5, 5, 9, 9])], sizes=sizes, split="val")
    source = open_coco(str(root), "val")
    with open(source[2], "wb"):
        pass
    batches = list(build_evaluation_loader(source, rank=0, world_size=1, **EVALUATION))
    assert torch.cat([b.weights for b in batches]).tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert [source[2] in text for b in batches for text in b.bad] == [True]


def test_mistaken_settings_are_refused(val):
    for changes in ({"micro_batch_size": 5}, {"global_batch_size": 64}):
        with pytest.raises((ConfigError, DataError), match=r"batch\.global_batch_size"):
            load(val, JITTERS[0], **changes)


def test_the_target_is_that_of_the_drawn_view(train):
    (batch,) = load(train, JITTERS[0], global_batch_size=1, micro_batch_size=1)[:1]
    target, index = batch.targets.targets[0], int(batch.indices[0])
    draws = uniforms(1, 3, [0], "jitter", 4)[0].tolist()
    view = JITTERS[0].view(*train.size(index), draws)
    expected = make_target(train.objects(index), view, (64, 64))
    assert all(torch.equal(a, b) for a, b in zip(target[:4], expected[:4], strict=True))
    assert torch.equal(
        batch.images[0, :, : view.size[0], : view.size[1]], view.image(read_image(train, index))
    )


@given(
    num_landscape=st.integers(0, 60),
    num_portrait=st.integers(0, 60),
    global_batch_size=st.integers(1, 16),
    epoch=st.integers(0, 3),
)
def test_batches_hold_one_orientation_and_nearly_all_samples_once(
    num_landscape, num_portrait, global_batch_size, epoch
):
    landscape = np.arange(num_landscape + num_portrait) < num_landscape
    num_updates = len(landscape) // global_batch_size
    if not num_updates:
        return
    order = grouped_order(landscape, 0, epoch, global_batch_size)
    assert len(order) == num_updates * global_batch_size
    batches = order.reshape(num_updates, global_batch_size)
    assert all(len(set(landscape[batch].tolist())) == 1 for batch in batches)
    again = len(order) - len(np.unique(order))
    assert again < global_batch_size


def test_orders_differ_by_epoch_and_seed_and_mix_orientations():
    landscape = np.random.default_rng(0).random(400) < 0.7
    first = grouped_order(landscape, 0, 0, 8)
    np.testing.assert_array_equal(first, grouped_order(landscape, 0, 0, 8))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != grouped_order(landscape, seed, epoch, 8)).mean() > 0.9
    wide = landscape[first.reshape(-1, 8)[:, 0]]
    for half in (wide[:25], wide[25:]):  # neither orientation waits for the end
        assert half.mean() == pytest.approx(0.7, abs=0.2)
    assert np.abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.15
