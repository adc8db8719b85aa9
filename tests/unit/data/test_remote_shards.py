"""Against moto's S3 server on the loopback, behind a proxy that fails on demand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from object_store import CREDENTIALS, Store, serving

from fd_large import files
from fd_large.data import blocks, objects, remote_shards, sampler
from fd_large.data.labelled import open_labelled, open_split
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.remote_shards import RemoteShards
from fd_large.data.sampler import Portion
from fd_large.data.shards import TarShards
from fd_large.data.source import open_images
from fd_large.data.tables import ParquetImages
from fd_large.data.views import ViewSettings
from fd_large.errors import DataError, StorageError

pytest.importorskip("moto")
pytest.importorskip("s3fs")
# What the answers for each object suffer in turn; a fourth failure would end the run.
FAULTS = ["503", "cut", "slow", "503"]


@pytest.fixture(scope="module")
def server():
    with serving() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch, tmp_path) -> Store:
    """The store, without faults and pauses."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(sampler, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(sampler, "WINDOW_SAMPLES", 1)
    monkeypatch.setattr(blocks, "_cache", [])
    blocks.keep_blocks_in(str(tmp_path / "blocks"), 1)
    server.suffer()
    server.released.clear()
    return server


@pytest.fixture
def bucket(store, shards, tables, request) -> str:
    """A bucket with the images in three tar shards and in two parquet files."""
    name = f"bucket-{abs(hash(request.node.name))}"
    store.upload(shards.parent / "shards", name, "shards/")
    store.upload(tables, name, "tables/")
    return f"s3://{name}"


def load(source, epoch=0, first=0, workers=0):
    """Positions, samples and pixels of one rank."""
    loader = build_loader(
        ViewBatches(source, ViewSettings(16, 0.5), 5, epoch),
        len(source),
        Portion(epoch, first, 4, 0, 1),
        global_batch_size=4,
        workers=workers,
    )
    found = []
    for batch in loader:
        assert batch.bad == ()
        rows = zip(batch.positions.tolist(), batch.indices.tolist(), batch.images, strict=True)
        found += [(place, index, image.numpy().tobytes()) for place, index, image in rows]
    return found


# The store speaks plain HTTP as well: a web server with ranges, without listings.
WEB = {
    "shards": "{store}/{name}/shards/train-{{000..002}}.tar",
    "tables": "{store}/{name}/tables/data/{{train,validation}}-00000-of-00001.parquet",
}


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("kind", ["shards", "tables"])
def test_nothing_is_lost_or_repeated_and_all_is_as_in_the_files(
    store, bucket, shards, tables, kind, scheme, tmp_path
):
    root = f"{bucket}/{kind}/"
    if scheme == "http":
        root = WEB[kind].format(store=store.url, name=bucket.removeprefix("s3://"))
    store.suffer(*FAULTS)
    source = open_images(root)
    assert isinstance(source, RemoteShards if kind == "shards" else ParquetImages)
    store.suffer(*FAULTS)
    blocks.keep_blocks_in(str(tmp_path / "other"), 1)  # Nothing of it is here yet.
    source = open_images(root)
    got = load(source)
    store.suffer(*FAULTS)
    assert load(pickle.loads(pickle.dumps(source)), workers=2) == got
    assert [place for place, _, _ in got] == list(range(24))
    # The same files on a disk: order and pixels are the same.
    files = {"shards": shards, "tables": tables}[kind]
    assert load(open_images(f"file://{files}")) == got
    # A resume at any position.
    for first in (1, 3, 5):
        assert load(source, first=first) == got[4 * first :]
    assert load(source, epoch=1) != got
    samples = [index for _, index, _ in got]
    assert len(set(samples)) == 24


def test_the_images_are_those_of_the_local_shards(bucket, shards):
    source, local = open_images(f"{bucket}/shards/train-{{000..002}}.tar"), TarShards(str(shards))
    names = {local[i].rpartition("tar/")[2]: bytes(local.read(i)) for i in range(26)}
    assert {source[i].rpartition("tar/")[2]: bytes(source.read(i)) for i in range(26)} == names
    assert source[0].startswith(f"{bucket}/shards/train-000.tar/")


def test_the_store_is_asked_once_for_each_shard_and_not_again_at_the_next_start(store, bucket):
    del store.asked[:]
    load(open_images(f"{bucket}/shards/"))
    load(open_images(f"{bucket}/shards/"))
    gets = [path for method, path in store.asked if method == "GET" and "list-type" not in path]
    assert len(gets) == len(set(gets)) == 3


def test_another_content_is_another_fingerprint(store, bucket, shards):
    before = open_images(f"{bucket}/shards/")
    name = bucket.removeprefix("s3://")
    client = store.client()
    content = (shards / "train-001.tar").read_bytes()
    client.put_object(Bucket=name, Key="shards/train-001.tar", Body=content + bytes(512))
    after = open_images(f"{bucket}/shards/")
    assert before.fingerprint != after.fingerprint
    blocks.keep_blocks_in(blocks.the_cache().folder.with_name("empty"), 1)
    with pytest.raises(DataError, match=r"train-001\.tar/0/0: .*changed"):
        _again(before).read(9)


def _again(source):
    """The source with the cache of now."""
    source._cache = blocks.the_cache()
    return pickle.loads(pickle.dumps(source))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_does_not_come_back_ends_the_run_to_go_on_later(
    store, bucket, tmp_path, workers
):
    source = open_images(f"{bucket}/shards/")
    blocks.keep_blocks_in(str(tmp_path / "empty"), 1)
    store.suffer(*["503", "cut"] * 20)
    with pytest.raises(StorageError, match=r"s3://.*\.tar: .* 4 times") as info:
        load(_again(source), workers=workers)
    assert info.value.exit_code == 75
    assert "\n" not in str(info.value)


def test_an_answer_that_stalls_is_given_up(store, bucket, monkeypatch):
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 2.0)
    store.suffer("stall")
    assert len(open_images(f"{bucket}/shards/train-000.tar")) == 9


def test_labels_beside_images_and_in_columns(bucket):
    labelled = open_labelled(f"{bucket}/shards/")
    assert labelled.labels.tolist() == [7] * 26
    train = open_split(f"{bucket}/tables", "train")
    test = open_split(f"{bucket}/tables/", "val", train.classes)
    assert (len(train), len(test), train.classes) == (22, 4, ("a", "b", "c"))
    assert np.bincount(train.labels).tolist() == [9, 9, 4]


def test_a_shard_that_is_cut_is_read_as_far_as_it_is_sound(store, shards, monkeypatch):
    path = shards / "train-000.tar"
    path.write_bytes(path.read_bytes()[:30_000])
    store.upload(shards, "bucket-torn", "")
    source = open_images("s3://bucket-torn/*.tar")
    (torn,) = source.torn
    assert torn.startswith("s3://bucket-torn/train-000.tar: an incomplete shard: ")
    assert 17 <= len(source) < 26
    monkeypatch.setattr(remote_shards, "_write", None)  # What is known is not read again.
    assert open_images("s3://bucket-torn/*.tar").torn == source.torn


def test_mistakes_are_one_sentence(store, bucket):
    for root, message in (
        (f"{bucket}/none/", "neither tar shards nor parquet files; got 's3://"),
        (bucket, "tar shards and parquet files in one place"),
        (
            f"{bucket}/shards/train-{{000..009}}.tar",
            "train-003.tar: cannot be read; got FileNotFou",
        ),
        ("s3://no-such-bucket/", "s3://no-such-bucket/: cannot be read; got FileNotFoundError"),
    ):
        with pytest.raises(DataError, match=f"^eval.root: .*{message}") as info:
            open_images(root, where="eval.root")
        assert "\n" not in str(info.value)
