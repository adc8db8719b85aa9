"""Pickles are carried out without running anything, within bounds."""

from __future__ import annotations

import pickle
import struct

import pytest
from torch_archives import DATA, NESTED, archive, tensor_pickle, text

from fd_large.errors import WeightsError
from fd_large.weights import torch_files
from fd_large.weights.read import read


@pytest.mark.parametrize(
    ("offset", "size", "stride", "numel"),
    [
        (1, (4,), (1,), 4),
        (0, (2, 3), (3, 1), 4),
        (0, (5,), (1,), 5),
        (0, (1 << 40,), (0,), 4),
        (0, (2,), (1 << 62,), 4),
        (-1, (2,), (1,), 4),
        (0, (2,), (-1,), 4),
        (0, (2, 2), (1,), 4),
        (0, (1 << 70,), (1,), 4),
    ],
)
def test_a_tensor_lies_in_its_data_and_is_no_larger(tmp_path, offset, size, stride, numel):
    archive(tmp_path / "a.pth", tensor_pickle(0, (4,), (1,)), more=DATA)
    assert read(tmp_path / "a.pth").shape("a") == (4,)
    archive(tmp_path / "a.pth", tensor_pickle(offset, size, stride, numel), more=DATA)
    with pytest.raises(WeightsError, match="damaged"):
        read(tmp_path / "a.pth")


# {((..., ...), (..., ...)): 1}, forty levels deep: hashing it takes 2^40 steps.
TUPLES = b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s."


def looped():
    loop = {}
    loop["state_dict"] = loop
    return loop


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TUPLES, "other values than dense tensors"),
        (pickle.dumps(looped(), 2), "dense tensors; got state_dict"),
        (b"\x80\x02" + b"}0" * 300_000 + b"}.", "500,000 operations"),
        (b"\x80\x02(" + b"(" * 100_000 + b".", "damaged"),
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
        (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".", "damaged"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "no named tensors"),
        (b"\x80\x02\x82\x01.", "damaged.*EXT1"),
        (b"\x80\x05\x97.", "damaged.*NEXT_BUFFER"),
        (b"\x80\x02(i" + b"os\nsystem\n.", "got os system"),
        (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "got OBJ"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", r"got os\.system"),
        (b"\x80\x02c__torch__.os\nsystem\n)\x81}b.", r"got __torch__\.os\.system"),
    ],
    ids=[
        *("tuples as key", "dict in itself", "operations", "marks", "memo", "bytes", "integer"),
        *("array of bytes", "frame", "extension", "buffer"),
        *("instance", "object", "global", "class of TorchScript elsewhere"),
    ],
)
def test_pickles_that_ask_for_time_memory_or_code_are_refused(tmp_path, data, message):
    archive(tmp_path / "a.pth", data)
    with pytest.raises(WeightsError, match=message):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("parts", [(NESTED, text("a")), (text("a"), NESTED)], ids=["first", "last"])
def test_a_name_is_a_text(tmp_path, parts):
    """Written out, this one would have hundreds of megabytes."""
    archive(tmp_path / "a.pth", b"\x80\x04" + b"".join(parts) + b"\x93.")
    with pytest.raises(WeightsError, match=r"damaged.*STACK_GLOBAL"):
        read(tmp_path / "a.pth")


def test_entries_that_are_copied_are_counted(tmp_path):
    """A dictionary of a few entries, copied once for each few bytes."""
    entries = b"\x80\x02}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(2000))
    calls = b"uq\x010ccollections\nOrderedDict\nq\x020(" + b"h\x02h\x01\x85R" * 60 + b"l."
    archive(tmp_path / "a.pth", entries + calls)
    with pytest.raises(WeightsError, match="100,000 entries: endless copies"):
        read(tmp_path / "a.pth")
    archive(tmp_path / "a.pth", entries + calls.replace(b"h\x02h\x01\x85R" * 20, b""))
    assert torch_files.load(tmp_path / "a.pth") == []


def test_a_tensor_has_few_dimensions(tmp_path):
    archive(tmp_path / "a.pth", tensor_pickle(0, (1,) * 64, (1,) * 64), more=DATA)
    assert read(tmp_path / "a.pth").shape("a") == (1,) * 64
    for size in ((1,) * 65, (1 << 62,) * 2000):
        archive(tmp_path / "a.pth", tensor_pickle(0, size, (0,) * len(size)), more=DATA)
        with pytest.raises(WeightsError, match="damaged") as error:
            read(tmp_path / "a.pth")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "operations",
    [b"K\x00K\x01s", b"(K\x00K\x01u", b"K\x01a", b"(K\x01e", b"R", b"\x81"],
)
def test_nothing_is_done_to_a_tensor(tmp_path, operations):
    """Items are neither set nor appended, and it is neither called nor made again."""
    data = tensor_pickle(0, (4,), (1,))
    end = data.rindex(b"R") + 1
    archive(tmp_path / "a.pth", data[:end] + operations + data[end:], more=DATA)
    with pytest.raises(WeightsError):
        read(tmp_path / "a.pth")


def test_a_state_for_a_tensor_is_passed_over(tmp_path):
    data = tensor_pickle(0, (4,), (1,))
    end = data.rindex(b"R") + 1
    archive(tmp_path / "a.pth", data[:end] + b"}b" + data[end:], more=DATA)
    assert read(tmp_path / "a.pth")["a"].tolist() == [0, 0, 0, 0]
