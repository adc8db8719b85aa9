"""One data set, loose or in shards, over any number of ranks and workers: the same pixels."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from fd_large.data.blocks import keep_blocks_in
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion, epoch_order
from fd_large.data.source import ImageSource, open_images
from fd_large.data.views import ViewSettings

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_SAMPLES, SEED = 64, 11
GLOBAL_BATCH = 12  # 5 steps of 12: 60 of 64 samples
NUM_USED = 60
SETTINGS = ViewSettings(64, 0.08, color_jitter=0.1, grayscale_probability=0.1)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageSource]:
    """The same 64 images three times: loose, in one tar, in four shards, in other orders."""
    data = Path(os.environ.get("FD_DATA", REPOSITORY / ".." / "shared" / "data"))
    tar = data / "imagenet_sample256.tar"
    if not tar.is_file():
        pytest.skip("FD_DATA has no imagenet_sample256.tar")
    root = tmp_path_factory.mktemp("forms")
    (root / "shards").mkdir()
    with tarfile.open(tar) as archive:
        for member in [x for x in archive if x.name.endswith(".JPEG")][::4]:
            archive.extract(member, root / "loose", filter="data")
    files = sorted((root / "loose").rglob("*.JPEG"), key=lambda path: path.name[::-1])
    for name, some in (("one", files), *((f"shards/{i}", files[i::4]) for i in range(4))):
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for path in some:
                archive.add(path, path.relative_to(root / "loose"))
    return {
        name: open_images(str(path))
        for name, path in (
            ("loose", root / "loose"),
            ("tar", root / "one.tar"),
            ("shards", f"{root}/shards/{{0..3}}.tar"),
        )
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that share small images among them take longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def epoch_of(
    source: ImageSource, epoch: int, *, world_size: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and pixels in the order of positions, from all ranks one after the other."""
    indices = torch.full((NUM_USED,), -1)
    images = torch.zeros(NUM_USED, 3, 64, 64, dtype=torch.uint8)
    for rank in range(world_size):
        for batch in build_loader(
            ViewBatches(source, SETTINGS, SEED, epoch),
            len(source),
            Portion(epoch, 0, 2, rank, world_size),
            global_batch_size=GLOBAL_BATCH,
            workers=workers,
        ):
            assert (indices[batch.positions] == -1).all()  # no place twice
            assert batch.bad == ()
            indices[batch.positions] = batch.indices
            images[batch.positions] = batch.images
    return indices, images


# of three workers on two cores
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_epoch_is_a_permutation_and_the_same_in_every_setting(forms):
    assert len({source.fingerprint for source in forms.values()}) == 1
    before = None
    for epoch in (0, 1):
        expected = epoch_of(forms["loose"], epoch, world_size=1, workers=0)
        order = epoch_order(NUM_SAMPLES, SEED, epoch, np.arange(NUM_SAMPLES))
        assert sorted(order.tolist()) == list(range(NUM_SAMPLES))
        assert expected[0].tolist() == order[:NUM_USED].tolist()
        assert before is None or not torch.equal(before, expected[0])
        before = expected[0]
        for form, source in forms.items():
            for world_size in (1, 2, 3):
                for workers in (0, 3):
                    if epoch == 1 and (world_size, workers) != (3, 3):
                        continue  # once is enough for the rest
                    indices, images = epoch_of(
                        source, epoch, world_size=world_size, workers=workers
                    )
                    setting = f"{form}, epoch {epoch}, {world_size} ranks, {workers} workers"
                    assert torch.equal(indices, expected[0]), setting
                    assert torch.equal(images, expected[1]), setting


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_parquet_files_are_the_same_in_every_setting(forms, tmp_path):
    """Their order is one of blocks, that of no folder."""
    loose = forms["loose"]
    cells = [{"bytes": bytes(loose.read(number))} for number in range(len(loose))]
    table = pyarrow.table({"image": cells})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    keep_blocks_in(str(tmp_path / "blocks"), 1)
    source = open_images(str(tmp_path / "train.parquet"))
    indices, images = epoch_of(source, 0, world_size=1, workers=0)
    assert len(set(indices.tolist())) == NUM_USED
    for world_size, workers in ((1, 3), (2, 0), (3, 3)):
        again = epoch_of(source, 0, world_size=world_size, workers=workers)
        assert torch.equal(indices, again[0])
        assert torch.equal(images, again[1])
