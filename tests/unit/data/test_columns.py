from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from fd_large.data.columns import Columns, cells, find_columns, labels_of
from fd_large.errors import DataError

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
    with pytest.raises(DataError, match=r"^data\.root: several columns of images; got mask, photo"):
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
    with pytest.raises(DataError, match=r"no column of images; got text \(string\), expected"):
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
        ([0, -1], None, "invalid label; got -1 to 0"),
        ([0, 2], ("a", "b"), "invalid label; got 0 to 2 .* up to 1"),
    ],
)
def test_what_is_no_class_is_refused(values, classes, message):
    with pytest.raises(DataError, match=message):
        labels_of(pa.chunked_array([values]), Columns("image", "label", classes), "x")
