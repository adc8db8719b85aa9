"""Batches of labelled images: the same on any number of ranks, and in whole groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.data.centre_crops import NO_LABEL, central_batches, central_view
from fd_large.data.labelled import LabelledImages, open_labelled
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.views import ViewSettings
from fd_large.tasks.classification import mixing
from fd_large.tasks.classification.section import FineTune
from fd_large.tasks.classification.views import GroupedBatches, Labelled, MixedBatches

GLOBAL, SIZE, EPOCH = 12, 16, 2
PLAIN = {"randaugment": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    root = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = root / "abcd"[number % 4]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((20 + number % 3, 24)).save(folder / f"{number}.png")
    return open_labelled(str(root))


def update(
    source: LabelledImages, number: int, ranks: int, micro: int, workers: int = 0, **recipe: float
) -> Batch:
    """The whole global batch of a step, as these ranks load it."""
    parts = []
    for rank in range(ranks):
        settings = ViewSettings(SIZE, 0.3, 2**20, interpolation="bicubic")
        batches = MixedBatches(source, FineTune(**recipe), OPENAI_CLIP, settings, 5, EPOCH, GLOBAL)
        portion = Portion(EPOCH, number, micro, rank, ranks)
        loaded = iter(
            build_loader(batches, len(source), portion, global_batch_size=GLOBAL, workers=workers)
        )
        parts += [next(loaded) for _ in range(GLOBAL // ranks // micro)]
    return Batch(
        torch.cat([part.images for part in parts]),
        EPOCH,
        torch.cat([part.positions for part in parts]),
        torch.cat([part.indices for part in parts]),
        sum((part.bad for part in parts), ()),
        torch.cat([part.targets for part in parts]),
    )


@pytest.mark.parametrize(("ranks", "micro"), [(2, 6), (2, 3), (4, 1), (12, 1), (1, 4)])
def test_ranks_and_micro_batches_change_no_pixel(pictures, ranks, micro):
    for number in range(3):
        whole = update(pictures, number, 1, GLOBAL)
        split = update(pictures, number, ranks, micro)
        assert torch.equal(whole.images, split.images)
        assert torch.equal(whole.targets, split.targets)
        assert torch.equal(whole.indices, split.indices)


def test_workers_change_nothing(pictures):
    whole, loaded = update(pictures, 1, 1, 6), update(pictures, 1, 1, 6, workers=2)
    assert torch.equal(whole.images, loaded.images)


def test_every_group_of_a_batch_has_a_draw_of_its_own(pictures, monkeypatch):
    monkeypatch.setattr("fd_large.data.mixing.GROUP", 4)
    whole = update(pictures, 0, 1, GLOBAL)
    alone = update(pictures, 0, 1, GLOBAL, mixup=0.0, cutmix=0.0)
    other = alone.images[[place ^ 1 for place in range(GLOBAL)]]
    mixes = [
        mixing.draw_mix(
            5, EPOCH, first, image_size=SIZE, mixup=0.8, cutmix=1.0, switch_probability=0.5
        )
        for first in range(0, GLOBAL, 4)
    ]
    assert len(set(mixes)) == 3
    for first, mix in zip(range(0, GLOBAL, 4), mixes, strict=True):
        group = slice(first, first + 4)
        expected = mixing.mix_images(alone.images[group], other[group], mix)
        assert torch.equal(whole.images[group], expected)
    # A micro batch may end within a group, or hold parts of two.
    for ranks, micro in ((2, 6), (2, 3), (4, 1)):
        split = update(pictures, 0, ranks, micro)
        assert torch.equal(whole.images, split.images)
        assert torch.equal(whole.targets, split.targets)


def test_updates_are_mixed_both_ways_and_erased(pictures):
    kinds = set()
    for number in range(3):
        for mixed in (update(pictures, number, 1, GLOBAL),):
            mix = mixing.draw_mix(
                5, EPOCH, number * GLOBAL, image_size=SIZE,
                mixup=0.8, cutmix=1.0, switch_probability=0.5,
            )  # fmt: skip
            kinds.add(mix.box is not None)
            alone = update(pictures, number, 1, GLOBAL, mixup=0.0, cutmix=0.0)
            other = alone.images[[place ^ 1 for place in range(GLOBAL)]]
            assert torch.equal(mixed.images, mixing.mix_images(alone.images, other, mix))
            assert torch.allclose(mixed.targets.sum(1), torch.ones(GLOBAL))
    assert kinds == {True, False}


def test_without_augmentation_a_view_is_the_normalised_crop(pictures):
    plain = update(pictures, 0, 1, GLOBAL, **PLAIN, smoothing=0.1)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in OPENAI_CLIP)
    levels = (plain.images * std + mean) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    labels = torch.tensor([pictures.label(int(index)) for index in plain.indices])
    assert torch.equal(plain.targets.argmax(1), labels)
    assert torch.allclose(plain.targets.max(1).values, torch.tensor(0.9 + 0.1 / 4))
    erased = update(pictures, 0, 1, GLOBAL, **{**PLAIN, "erasing": 1.0})
    changed = (erased.images != plain.images).any(1).flatten(1)
    share = changed.float().mean(1)
    assert (share > 0.01).all()
    assert (share < 0.4).all()
    noise = erased.images.permute(0, 2, 3, 1)[(erased.images != plain.images).all(1)]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_a_bad_picture_has_the_same_stand_in_on_any_rank(pictures, tmp_path):
    for number in range(40):
        folder = tmp_path / "abcd"[number % 4]
        folder.mkdir(exist_ok=True)
        source = Path(pictures.images.root) / folder.name / f"{number}.png"
        content = b"no image" if number % 5 == 0 else source.read_bytes()
        (folder / f"{number}.png").write_bytes(content)
    broken = open_labelled(str(tmp_path))
    whole, split = update(broken, 0, 1, GLOBAL), update(broken, 0, 4, 1)
    assert torch.equal(whole.images, split.images)
    assert torch.equal(whole.targets, split.targets)
    # Each is counted once, by the rank whose place it is.
    assert whole.bad
    assert sorted(whole.bad) == sorted(split.bad)


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (33, 33), (20, 200)])
def test_the_middle_is_torchvisions(size):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    resized = F.resize(image, [int(256 / 224 * 28)], interpolation=F.InterpolationMode.BICUBIC)
    assert torch.equal(central_view(image, 28), F.center_crop(resized, [28, 28]))


def test_ranks_share_the_test_pictures_batch_by_batch(pictures):
    def batches(rank: int, world_size: int) -> list:
        return list(
            central_batches(
                pictures, image_size=SIZE, batch_size=7, rank=rank, world_size=world_size,
                workers=0, max_pixels=2**20,
            )
        )  # fmt: skip

    alone = batches(0, 1)
    assert [len(batch.labels) for batch in alone] == [7, 7, 7, 7, 7, 5]
    assert sum(int((batch.labels != NO_LABEL).sum()) for batch in alone) == 40
    shared = sorted((b for rank in range(4) for b in batches(rank, 4)), key=lambda b: b.start)
    for one, other in zip(alone, shared, strict=True):
        assert one.start == other.start
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def load(positions):
    """An image is its position; the label is ten times as much."""
    at = torch.from_numpy(positions)
    return Labelled(at.byte(), at + 100, 10 * at, tuple((f"bad {p}",) for p in positions))


def test_a_micro_batch_that_ends_inside_a_group_brings_the_rest():
    batches = GroupedBatches(SimpleNamespace(load=load, epoch=3), 4)
    batch = batches[np.arange(6, 10)]
    assert batch.images.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    places = batch.targets["places"]
    assert batch.images[places].tolist() == batch.positions.tolist() == [6, 7, 8, 9]
    assert batch.targets["labels"].tolist() == [60, 70, 80, 90]
    assert batch.indices.tolist() == [106, 107, 108, 109]
    # What is bad among the others is their own micro batches' to count.
    assert batch.bad == ("bad 6", "bad 7", "bad 8", "bad 9")
