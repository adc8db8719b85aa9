"""Full tensors from the files of any number of ranks."""

import pytest
import torch
from stored_run import store_tensors

from fd_large.checkpoint import read, store, stream
from fd_large.checkpoint.read import Reader
from fd_large.errors import CheckpointError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(read, "SECONDS_BETWEEN_TRIES", 0.0)


TENSORS = {
    "student.a": torch.randn(5, 7),
    "student.b": torch.randn(1),
    "student.c": torch.randn(2, 3, 2),
    "projection.bias": torch.randn(4),
}
SHAPES = {"c": (2, 3, 2), "a": (5, 7), "b": (1,)}


@pytest.mark.parametrize("ranks", [1, 3, 40])
@pytest.mark.parametrize("stage", [1, 3])
def test_full_tensors_are_read_from_any_number_of_files(tmp_path, ranks, stage):
    store_tensors(tmp_path, TENSORS, ranks=ranks, stage=stage)
    reader = stream.newest(tmp_path)
    stream.check(reader, SHAPES, prefix="student.")
    for name, shape in SHAPES.items():
        name = f"student.{name}"
        assert torch.equal(stream.read(reader, name, shape), TENSORS[name])


def test_an_older_one_does_not_take_the_place_of_the_newest(tmp_path):
    older = store_tensors(tmp_path, TENSORS, update=1)
    newer = store_tensors(tmp_path, TENSORS, update=2)
    assert stream.newest(tmp_path).manifest["update"] == 2
    (newer / store.file_of(0)).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"{newer.name}: .*{older}"):
        stream.newest(tmp_path)
    assert stream.newest(older).manifest["update"] == 1
    (older / store.receipt_of(0)).unlink()
    with pytest.raises(CheckpointError, match=f"{newer.name}: .*{store.receipt_of(0)}"):
        stream.newest(tmp_path)


@pytest.mark.parametrize(
    "shapes", [{"a": (5, 7), "b": (1,)}, {**SHAPES, "d": (1,)}, {**SHAPES, "a": (5, 6)}]
)
def test_another_model_is_refused(tmp_path, shapes):
    store_tensors(tmp_path, TENSORS)
    with pytest.raises(CheckpointError, match="does not match the model"):
        stream.check(stream.newest(tmp_path), shapes, prefix="student.")


def test_the_outcome_of_a_run_is_its_average_where_it_keeps_one(tmp_path):
    average = {name: tensor + 1 for name, tensor in TENSORS.items()}
    for folder, ema, expected in (("plain", None, TENSORS), ("averaged", average, average)):
        store_tensors(tmp_path / folder, TENSORS, ranks=3, ema=ema)
        reader = stream.newest(tmp_path / folder)
        found = stream.read(reader, "student.a", (5, 7), kind=stream.outcome(reader))
        assert torch.equal(found, expected["student.a"])
        whole = Reader(store.Stored(reader.path, reader.manifest))
        assert torch.equal(stream.read(whole, "student.a", (5, 7)), TENSORS["student.a"])
