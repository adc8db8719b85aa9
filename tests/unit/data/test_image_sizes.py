from __future__ import annotations

from collections import Counter

import torch

from fd_large.data.folder import ImageFolder
from fd_large.data.image_sizes import ImageSizes
from fd_large.data.loader import Batch, ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.views import ViewSettings

SIDES, SEED, EPOCH, GLOBAL_BATCH = (16, 24, 32), 5, 1, 6


def load(folder, sides=SIDES, *, first=0, micro=2, rank=0, ranks=1, workers=0) -> list[Batch]:
    source = ImageFolder(folder)
    sizes = ImageSizes(sides, SEED, GLOBAL_BATCH)
    return list(
        build_loader(
            ViewBatches(source, ViewSettings(16, 0.3), SEED, EPOCH, sizes=sizes),
            len(source),
            Portion(EPOCH, first, micro, rank, ranks),
            global_batch_size=GLOBAL_BATCH,
            workers=workers,
        )
    )


def test_sizes_are_drawn_by_place_and_equally_often():
    sizes = ImageSizes(SIDES, SEED, GLOBAL_BATCH)
    drawn = [sizes.at(EPOCH, GLOBAL_BATCH * step) for step in range(300)]
    assert [sizes.at(EPOCH, GLOBAL_BATCH * step + 5) for step in range(300)] == drawn
    assert drawn != [sizes.at(EPOCH + 1, GLOBAL_BATCH * step) for step in range(300)]
    # Binomial: 100 of 300, with a standard deviation of 8.2.
    assert all(abs(number - 100) < 40 for number in Counter(drawn).values())
    assert set(drawn) == set(SIDES)


def test_a_step_has_one_size_on_any_number_of_ranks_and_after_a_resume(picture_folder):
    whole = load(picture_folder, micro=6)
    sides = [batch.images.shape[-1] for batch in whole]
    assert sides == [ImageSizes(SIDES, SEED, GLOBAL_BATCH).at(EPOCH, 6 * i) for i in range(4)]
    assert len(set(sides)) > 1
    for ranks, micro, workers in ((1, 2, 1), (2, 3, 0), (3, 1, 0)):
        parts = [
            load(picture_folder, micro=micro, rank=rank, ranks=ranks, workers=workers)
            for rank in range(ranks)
        ]
        count = 6 // ranks // micro
        for step, batch in enumerate(whole):
            same = [part for own in parts for part in own[step * count : (step + 1) * count]]
            assert torch.equal(torch.cat([part.images for part in same]), batch.images)
    resumed = load(picture_folder, first=2, micro=6)
    assert all(torch.equal(a.images, b.images) for a, b in zip(resumed, whole[2:], strict=True))


def test_a_single_size_is_a_run_without_sizes(picture_folder):
    source = ImageFolder(picture_folder)
    plain = ViewBatches(source, ViewSettings(16, 0.3), SEED, EPOCH)
    for batch in load(picture_folder, (16,)):
        assert torch.equal(batch.images, plain[batch.positions.numpy()].images)
