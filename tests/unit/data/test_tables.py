"""Tables of images: parquet files, and what columns and cells hold."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fd_large.data import folder, roots, sampler
from fd_large.data import tables as table_images
from fd_large.data.folder import ImageFolder
from fd_large.data.labelled import open_labelled, open_split, training_part
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import open_images
from fd_large.data.tables import Columns, ParquetImages, cells, find_columns, labels_of
from fd_large.data.views import ViewSettings
from fd_large.errors import DataError

SETTINGS = ViewSettings(16, 0.5)


def load(source, epoch=0, first=0, workers=0, micro=4, world=1):
    """What each rank of a run gets, in turn: positions, samples, pixels."""
    found = []
    for rank in range(world):
        loader = build_loader(
            ViewBatches(source, SETTINGS, 5, epoch),
            len(source),
            Portion(epoch, first, micro, rank, world),
            global_batch_size=8,
            workers=workers,
        )
        for batch in loader:
            assert batch.bad == ()
            rows = zip(batch.positions.tolist(), batch.indices.tolist(), batch.images, strict=True)
            found += [(place, index, image.numpy().tobytes()) for place, index, image in rows]
    return sorted(found)


@pytest.fixture
def few_at_a_time(monkeypatch):
    monkeypatch.setattr(sampler, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(sampler, "WINDOW_SAMPLES", 1)


def test_the_rows_are_the_images_of_the_folder(tables, picture_folder):
    folder, source = ImageFolder(picture_folder), open_images(str(tables))
    assert isinstance(source, ParquetImages)
    assert source.kind == "7 row groups of 2 parquet files"
    assert len(source) == 26
    copy = pickle.loads(pickle.dumps(source))
    for index in range(26):
        assert source.read(index) == copy.read(index) == folder.read(index)
    assert source[5] == f"{tables}/data/train-00000-of-00001.parquet/1/1"
    with pytest.raises(IndexError):
        source[26]


@pytest.mark.parametrize(
    "root", ["", "/data", "/data/*.parquet", "/data/{train,validation}-00000-of-00001.parquet"]
)
def test_roots_of_parquet_files(tables, root):
    assert len(open_images(f"{tables}{root}")) == 26
    assert open_images(f"{tables}{root}").fingerprint == open_images(f"{tables}").fingerprint


@pytest.mark.usefixtures("few_at_a_time")
def test_order_and_pixels_are_functions_of_the_position(tables, picture_folder):
    source = open_images(str(tables))
    whole = load(source)
    assert len(whole) == 24
    assert load(source, workers=2, micro=2, world=2) == whole
    assert load(source, first=2) == [row for row in whole if row[0] >= 16]
    samples = [index for _, index, _ in whole]
    assert [i for _, i, _ in load(source, epoch=1)] != samples
    # The same samples of a folder give the same pixels.
    folder = ImageFolder(picture_folder)
    batches = ViewBatches(folder, SETTINGS, 5, 0)
    for place, index, pixels in whole[:8]:
        chosen = ViewBatches(Renumbered(folder, index), SETTINGS, 5, 0)
        assert chosen[np.array([place])].images.numpy().tobytes() == pixels
    assert batches.source is folder


class Renumbered:
    """One image, whatever the number."""

    def __init__(self, folder, index):
        self.folder, self.index = folder, index

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        return self.folder[self.index]

    def read(self, index):
        return self.folder.read(self.index)


def test_a_class_column_labels_them(tables):
    train = open_split(str(tables), "train")
    test = open_split(str(tables), "val", train.classes)
    assert (len(train), len(test)) == (22, 4)
    assert train.classes == ("a", "b", "c")
    everything = open_labelled(str(tables))
    assert [everything.classes[label] for label in everything.labels] == ["a"] * 9 + ["b"] * 9 + [
        "c"
    ] * 8
    assert training_part(str(tables)) == f"{tables}/data/train-*.parquet"


def test_bad_cells_are_named_and_counted(tmp_path, picture_folder, few_at_a_time):
    good = ImageFolder(picture_folder)
    cells = [bytes(good.read(i)) for i in range(16)]
    cells[3], cells[9] = None, b"no image"
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet", row_group_size=4)
    source = open_images(str(tmp_path / "x.parquet"))
    loader = build_loader(
        ViewBatches(source, SETTINGS, 0, 0),
        16,
        Portion(0, 0, 8, 0, 1),
        global_batch_size=8,
        workers=0,
    )
    bad = [message for batch in loader for message in batch.bad]
    named = {message.partition(": ")[0] for message in bad}
    assert named == {f"{tmp_path}/x.parquet/0/3", f"{tmp_path}/x.parquet/2/1"}


def test_a_damaged_row_group_costs_its_own_images(tmp_path, picture_folder):
    good = ImageFolder(picture_folder)
    table = pa.table({"image": [bytes(good.read(i)) for i in range(16)]})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=4, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    source = open_images(str(path))
    for index in (0, 3, 8, 15):
        assert source.read(index) == good.read(index)
    with pytest.raises(DataError, match=r"x\.parquet/1/1: .*x\.parquet: "):
        source.read(5)


def test_a_file_that_changed_is_not_read(tables):
    source = open_images(str(tables))
    path = tables / "data" / "train-00000-of-00001.parquet"
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DataError, match="changed since"):
        source.read(0)


def test_an_image_beside_the_table_is_found_by_its_path(tmp_path, picture_folder):
    folder = ImageFolder(picture_folder)
    shutil.copytree(picture_folder, tmp_path / "data" / "images")
    name = os.path.relpath(folder[0], picture_folder)
    (tmp_path / "private.png").write_bytes(b"private")
    names = [
        f"images/{name}",
        # As it was where the dataset was written.
        f"/home/of/others/images/{name}",
        "gone.jpg",
        "../private.png",
        "images/../../private.png",
        str(tmp_path / "private.png"),
        f"/{tmp_path}/private.png",
        "\0",
        "a/" * 100_000,
        "images",
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": name} for name in names], kind)
    pq.write_table(pa.table({"image": cells}), tmp_path / "data" / "x.parquet")
    source = open_images(str(tmp_path / "data"))
    found = [bytes(source.read(index)) for index in range(len(names))]
    assert found == [bytes(folder.read(0))] * 2 + [b""] * 8


def test_a_cell_larger_than_a_file_may_be_is_no_image(tmp_path, monkeypatch):
    for module in (folder, table_images):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    tables = {"mixed": [b"\0" * 5000, *[b"image"] * 9], "alone": [b"\0" * 5000]}
    sources = {}
    for name, content in tables.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": content}), path, compression="zstd", use_dictionary=False)
        sources[name] = open_images(str(path))
    for source in sources.values():
        with pytest.raises(DataError, match=r"50[0-9][0-9] bytes"):
            source.read(0)
    assert sources["mixed"].read(1) == b"image"


def test_a_row_group_that_memory_does_not_hold_is_told(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [b"image"]}), tmp_path / "x.parquet")
    source = open_images(str(tmp_path / "x.parquet"))

    def full(*_, **__):
        raise pa.lib.ArrowMemoryError("malloc of size 9 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", full)
    with pytest.raises(DataError, match=r"size 9 .*fewer rows"):
        source.read(0)


def test_mistakes_are_one_sentence(tmp_path, tables, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no table")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"jpg": [b"a"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "own.parquet")
    for name, message in (
        ("x", r"x\.parquet: .*got "),
        ("text", r"text\.parquet: .*got text \(string\)"),
        ("empty", "no image in the parquet files"),
        ("gone", r"gone\.parquet: .*no such file"),
        ("{own,other}", "parquet files of different kinds"),
        ("g*ne", r"got '.*g\*ne\.parquet'"),
    ):
        with pytest.raises(DataError, match=f"^eval.root: .*{message}") as info:
            open_images(f"{tmp_path}/{name}.parquet", where="eval.root")
        assert "\n" not in str(info.value)
    monkeypatch.setattr(roots, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"data\.root: .* pyarrow"):
        open_images(str(tables))


CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def with_features(schema, **features):
    stated = json.dumps({"info": {"features": features}})
    return schema.with_metadata({"huggingface": stated})


def test_features_name_the_columns():
    schema = pa.schema({"mask": CELL, "photo": CELL, "id": pa.int64(), "kind": pa.int64()})
    stated = with_features(
        schema, photo={"_type": "Image"}, kind={"_type": "ClassLabel", "names": ["a", "b"]}
    )
    assert find_columns(stated, "data.root") == Columns("photo", "kind", ("a", "b"))
    with pytest.raises(DataError, match=r"^data\.root: .*got mask, photo"):
        find_columns(schema, "data.root")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"image": pa.binary(), "label": pa.int32()}, ("image", "label")),
        ({"jpg": pa.large_binary(), "cls": pa.string()}, ("jpg", "cls")),
        ({"anything": pa.binary(), "label": pa.float32()}, ("anything", None)),
        ({"image": pa.binary(), "thumbnail": pa.binary()}, ("image", None)),
    ],
)
def test_types_and_names_tell_the_columns(columns, found):
    assert find_columns(pa.schema(columns), "x")[:2] == found


def test_a_table_without_images_says_what_it_has():
    with pytest.raises(DataError, match=r"got text \(string\)"):
        find_columns(pa.schema({"text": pa.string()}), "x")


def test_a_cell_has_bytes_or_a_path_or_nothing():
    rows = [{"bytes": b"x", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    found = cells(pa.array(rows, CELL))
    assert [(data and data.to_pybytes(), path) for data, path in found] == [
        (b"x", "a.jpg"),
        (None, "b.jpg"),
        (None, ""),
    ]
    assert [data and data.to_pybytes() for data, _ in cells(pa.array([b"y", None]))] == [b"y", None]


def test_words_are_classes_in_their_order():
    column = pa.chunked_array([["dog", "cat"], ["dog"]])
    labels, names = labels_of(column, Columns("image", "label", None), "x")
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == np.int64
    assert names == ("cat", "dog")


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ([0, None], None, "1 empty cells of column label"),
        ([0, -1], None, "got -1 to 0"),
        ([0, 2], ("a", "b"), "got 0 to 2 .* up to 1"),
    ],
)
def test_what_is_no_class_is_refused(values, classes, message):
    with pytest.raises(DataError, match=message):
        labels_of(pa.chunked_array([values]), Columns("image", "label", classes), "x")
