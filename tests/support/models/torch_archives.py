"""Torch archives of any pickle, written byte by byte."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch


def archive(path, data, *, compress=zipfile.ZIP_STORED, more=()):
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), *more):
            file.writestr(f"archive/{name}", content)


def tensor_pickle(offset, size, stride, numel=4):
    """The pickle of {"a": a tensor of these numbers}."""

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            arguments = (Storage(), offset, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Rebuilt()})
    return buffer.getvalue()


DATA = (("data/0", b"\x00" * 16),)


def text(name):
    return b"X" + struct.pack("<I", len(name)) + name.encode()


# A tuple that holds two tuples that hold two tuples, on 26 levels.
NESTED = b")" + b"2\x86" * 26
