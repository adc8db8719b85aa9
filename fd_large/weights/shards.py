"""safetensors written tensor by tensor, cut at a chosen size, with an index as Hugging Face's.

The format wants its header first; the header needs shapes only, so that no file has to stand in
memory before it is written. Source: the safetensors format, and transformers' sharded checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fd_large.backbones.translation import Shape
from fd_large.errors import ConfigError

NAME = "model.safetensors"
INDEX = f"{NAME}.index.json"
_BYTES = 4  # float32.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Returns the bytes of "5GB", "300MB", "80KB" or a plain number; units are powers of 1000.

    Raises: ConfigError: for another word.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper().replace("IB", "B"))
    size = int(float(found[1]) * _UNITS.get(found[2], 1)) if found else 0
    if size < 1 or (found and found[2] == "B"):
        raise ConfigError(
            f"--shard_size: no size of a file; got {text!r}, expected a number with KB, MB, GB or "
            "TB. Write for instance 5GB."
        )
    return size


def planned(shapes: Iterable[tuple[str, Shape]], shard_size: int) -> list[dict[str, Shape]]:
    """Cuts tensors, in their order, into files of at most `shard_size` bytes of float32.

    A tensor that is larger than that has a file of its own.
    """
    files: list[dict[str, Shape]] = [{}]
    held = 0
    for name, shape in shapes:
        size = _BYTES * math.prod(shape)
        if files[-1] and held + size > shard_size:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    return files


def write_shards(
    folder: Path, shapes: list[tuple[str, Shape]], items: Iterable[tuple[str, Tensor]], size: int
) -> list[Path]:
    """Writes tensors as float32, each as soon as it comes; returns the files.

    Args:
        folder: Exists; a single file is NAME, several have numbers and an index.
        shapes: Of all tensors, in the order in which they come.
        items: Those tensors.
        size: Most bytes of a file.
    """
    files = planned(shapes, size)
    paths = [_path(folder, number, len(files)) for number in range(len(files))]
    stream = iter(items)
    for path, tensors in zip(paths, files, strict=True):
        aside = path.with_name(f"{path.name}.part")
        with aside.open("wb") as file:
            _write_header(file, tensors)
            for expected, shape in tensors.items():
                name, tensor = next(stream)
                assert (name, tuple(tensor.shape)) == (expected, shape)
                _write_values(file, tensor)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    if len(files) > 1:
        total = sum(_BYTES * math.prod(shape) for _, shape in shapes)
        places = {n: p.name for p, t in zip(paths, files, strict=True) for n in t}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return paths


def _path(folder: Path, number: int, count: int) -> Path:
    if count == 1:
        return folder / NAME
    stem, _, suffix = NAME.partition(".")
    return folder / f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"


def _write_header(file: BinaryIO, tensors: dict[str, Shape]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + _BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at a multiple of eight bytes.
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    # The format is little-endian, as is every machine that torch runs on.
    values = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
    file.write(memoryview(values.numpy()).cast("B"))
