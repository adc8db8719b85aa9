"""Exports a student to a folder with tensors, config.json and a model card.

Tensors are written one at a time: the header of a safetensors file comes first and needs only
shapes, so that no file has to be in memory before it is written. If there are several files, an
index names the file of each tensor, as in transformers' sharded checkpoints.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fd_large.backbones.exports import Export
from fd_large.backbones.registry import family_of, parameter_shapes
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Shape, Shapes
from fd_large.backbones.windows import WindowRule
from fd_large.errors import ConfigError
from fd_large.files import new_folder, replacing, write_json
from fd_large.ranks import activity
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import check_finite
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.origin import CARD
from fd_large.weights.sidecar import own_config

NAME = "model.safetensors"
INDEX = f"{NAME}.index.json"
HEADS = "heads"
"""Name of the subfolder with the heads of a task, which only this project reads."""
_BYTES = 4  # float32.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export_of(
    architecture: FamilyArchitecture, to: To, *, pads: bool, window_rule: WindowRule = "masked"
) -> Export | None:
    """Returns how a model is written in a library's format; None if the format is a graph.

    Args:
        architecture: The student, with the image size of the export.
        to: The value of `--to`.
        pads: Whether the run pads images whose size does not fit.
        window_rule: The run's rule for maps that windows do not divide.

    Raises: ConfigError: if the library lacks the model, with the formats that can hold it.
    """
    if LIBRARIES[to].graph:
        return None
    if reason := _lacks(architecture, to, pads, window_rule):
        able = [
            f"--to {form}"
            for form in libraries_of(architecture, pads=pads, window_rule=window_rule)
        ]
        raise ConfigError(
            f"export: --to {to}: this student is not {LIBRARIES[to].holds}; got {reason}. Use "
            f"{', '.join(able[:-1])} or {able[-1]}."
        )
    return family_of(architecture).exports[to]


def libraries_of(
    architecture: FamilyArchitecture, *, pads: bool, window_rule: WindowRule = "masked"
) -> list[To]:
    """Returns the values of `--to` whose format can hold a model without a task's heads.

    The arguments are those of `export_of`.
    """
    return [
        form
        for form, library in LIBRARIES.items()
        if library.graph or not (library.heads or _lacks(architecture, form, pads, window_rule))
    ]


def _lacks(architecture: FamilyArchitecture, to: To, pads: bool, window_rule: WindowRule) -> str:
    """Returns why `to`, a format of tensors, cannot hold a model, in words; "" if it can."""
    exports = family_of(architecture).exports
    if to not in exports:
        return f"a {architecture.family} model, which has no export of this kind"
    rule = exports[to].window_rule
    if rule and rule != window_rule:
        return f"window_rule {window_rule}, expected {rule}"
    return exports[to].lacks(architecture, pads)


def resized(architecture: FamilyArchitecture, image_size: int) -> FamilyArchitecture:
    """Returns a trained model for images of another side in pixels; 0 keeps that of its training.

    Raises: ConfigError: if the model's tensors would change, since its positions are made for the
        size of the training.
    """
    if image_size in (0, architecture.image_size):
        return architecture
    other = architecture.at(image_size)
    if other.image_size != image_size or parameter_shapes(other) != parameter_shapes(architecture):
        side = architecture.image_size
        raise ConfigError(
            f"--image_size: the positions of this {architecture.family} model are made for its "
            f"images; got {image_size}, expected {side}. Export the model at {side}; for another "
            "size train at that size with --student.init RUN, which resizes the positions."
        )
    return other


def export(
    items: Iterable[tuple[str, Tensor]],
    shapes: Shapes,
    architecture: FamilyArchitecture,
    into: Export,
    out: Path,
    *,
    statistics: Statistics,
    shard_size: int,
    card: str,
    code_hash: str = "",
    trained_by: Sequence[Mapping[str, Any]] = (),
    beside: Callable[[Path], None] = lambda folder: None,
) -> list[Path]:
    """Writes a student to a new folder; returns the paths of the files with tensors.

    The folder appears when it is complete. Only one tensor of `items` is in memory at a time.

    Args:
        items: (our name, tensor) pairs in the order of `shapes`.
        shapes: {our name: shape} of all tensors.
        architecture: The student, with the image size of the export.
        into: Result of `export_of`.
        out: The folder, which must not exist yet.
        shard_size: Largest size of a file in bytes.
        card: Text of the model card.
        statistics, code_hash, trained_by: As in `sidecar.own_config`.
        beside: Function that writes further files into the folder before it appears.

    Raises:
        ConfigError: If `out` exists or cannot be written.
        WeightsError: For a tensor that contains NaN or infinity.
    """
    theirs = [
        (output.name, output.shape)
        for name, shape in shapes.items()
        for output in into.outputs(name, shape, architecture)
    ]
    added = into.added(architecture)
    theirs += [(name, tuple(tensor.shape)) for name, tensor in added.items()]
    with new_folder(out, where="export") as part:
        tensors = chain(_renamed(items, architecture, into), added.items())
        files = write_shards(part, theirs, tensors, shard_size)
        config = configuration(
            architecture, into, statistics, code_hash=code_hash, trained_by=trained_by
        )
        write_json(part / "config.json", config)
        if into.preprocessor:
            config = into.preprocessor(architecture, statistics)
            write_json(part / "preprocessor_config.json", config)
        (part / CARD).write_text(card)
        beside(part)
    return [out / file.name for file in files]


def configuration(
    architecture: FamilyArchitecture,
    into: Export,
    statistics: Statistics,
    *,
    code_hash: str = "",
    trained_by: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Returns the contents of config.json: entries for the library's loader and for this package.

    The arguments are those of `export`.
    """
    theirs = into.config(architecture, statistics) if into.config else {}
    return theirs | own_config(
        into.becomes(architecture), statistics, code_hash=code_hash, trained_by=trained_by
    )


def _renamed(
    items: Iterable[tuple[str, Tensor]], architecture: FamilyArchitecture, into: Export
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in items:
        check_finite(name, tensor, "the checkpoint", "export")
        for output in into.outputs(name, tuple(tensor.shape), architecture):
            yield output.name, output.take(tensor)


def parse_size(text: str) -> int:
    """Returns the number of bytes that `text` states, such as "5GB", "300MB", "80KB" or "5000".

    Units are powers of 1000, also "GiB" and the like. A number without a unit is in bytes.

    Raises: ConfigError: if `text` has another form or unit, or states less than 1 byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper().replace("IB", "B"))
    size = float(match[1]) * _UNITS.get(match[2], 1) if match else 0
    if not 1 <= size < math.inf or (match and match[2] == "B"):
        raise ConfigError(
            f"--shard_size: not a file size; got {text!r}, expected a number with KB, MB, GB or "
            "TB. Write for example 5GB."
        )
    return int(size)


def planned(shapes: Iterable[tuple[str, Shape]], shard_size: int) -> list[dict[str, Shape]]:
    """Distributes float32 tensors over files, in order; returns {name: shape} for each file.

    No file is larger than `shard_size` bytes, unless a single tensor is, in a file of its own.
    """
    files: list[dict[str, Shape]] = [{}]
    file_bytes = 0
    for name, shape in shapes:
        size = _BYTES * math.prod(shape)
        if files[-1] and file_bytes + size > shard_size:
            files.append({})
            file_bytes = 0
        files[-1][name] = shape
        file_bytes += size
    return files


def write_shards(
    folder: Path, shapes: list[tuple[str, Shape]], items: Iterable[tuple[str, Tensor]], size: int
) -> list[Path]:
    """Writes tensors as float32 to safetensors files, one tensor at a time.

    A single file has the name model.safetensors. Several files have numbered names, and an index
    names the file of each tensor.

    Args:
        folder: An existing folder.
        shapes: (name, shape) of all tensors, in the order of `items`.
        items: (name, tensor) pairs.
        size: Largest size of a file in bytes, as in `planned`.

    Returns: the paths of the files, without the index.
    """
    files = planned(shapes, size)
    paths = [_path(folder, number, len(files)) for number in range(len(files))]
    stream = iter(items)
    for path, tensors in zip(paths, files, strict=True):
        with replacing(path) as aside, aside.open("wb") as file:
            _write_header(file, tensors)
            for expected, shape in activity.counted(tensors.items(), path.name, "tensors"):
                name, tensor = next(stream)
                assert (name, tuple(tensor.shape)) == (expected, shape)
                _write_values(file, tensor)
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
