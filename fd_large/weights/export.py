"""A student into a folder that others load: tensors one at a time, a config, a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.backbones.exports import Export
from fd_large.backbones.registry import family_of
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Shapes
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import check_finite
from fd_large.weights.shards import write_shards
from fd_large.weights.sidecar import own_config

CARD = "README.md"
LIBRARIES = {
    "timm": "a model of timm",
    "hf": "a model of transformers",
    "fd": "the names of the Feature-Distillation repository",
}


def export_of(architecture: FamilyArchitecture, to: str, *, pads: bool) -> Export:
    """Returns what a model becomes in a library's files.

    Args:
        architecture: With the image size of the run.
        to: One of LIBRARIES.
        pads: Whether the run pads images that do not fit.

    Raises: ConfigError: if the library has no such model, naming those that have it.
    """
    exports = family_of(architecture).exports

    def lacks(form: str) -> str:
        if form not in exports:
            return f"a {architecture.family} model, of which it has none"
        return exports[form].lacks(architecture, pads)

    if reason := lacks(to):
        able = [f"--to {form}" for form in LIBRARIES if not lacks(form)]
        remedy = f"Use {' or '.join(able)}" if able else "Nothing has it: keep the checkpoint"
        raise ConfigError(
            f"export: --to {to}: this student is not {LIBRARIES[to]}; got {reason}. {remedy}."
        )
    return exports[to]


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
) -> list[Path]:
    """Writes a new folder; returns the files of tensors.

    The folder appears once it is whole. In memory is one tensor of `items` at a time.

    Args:
        items: (name, tensor) in our names and in the order of `shapes`.
        shapes: Shapes of all of them.
        architecture: The student, with the image size that it was trained at.
        into: What `export_of` returns for it.
        out: Does not exist.
        statistics: By which the student's images are normalised.
        shard_size: Most bytes of a file.
        card: Text of the model card.

    Raises: ConfigError: if something stands at `out`, or it cannot be written; WeightsError: for a
        tensor that holds NaN or infinity.
    """
    if out.exists():
        raise ConfigError(
            f"export: {out}: something is there already; got a "
            f"{'folder' if out.is_dir() else 'file'}, expected a new name. Move it, or name "
            "another."
        )
    theirs = [
        (output.name, output.shape)
        for name, shape in shapes.items()
        for output in into.outputs(name, shape, architecture)
    ]
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        files = write_shards(part, theirs, _renamed(items, architecture, into), shard_size)
        _write_json(part / "config.json", configuration(architecture, into, statistics))
        if into.preprocessor:
            config = into.preprocessor(architecture, statistics)
            _write_json(part / "preprocessor_config.json", config)
        (part / CARD).write_text(card)
        part.rename(out)
    except OSError as error:
        raise ConfigError(
            f"export: {out}: cannot be written; got {error}, expected a folder with room for the "
            "student. Choose another."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [out / file.name for file in files]


def configuration(
    architecture: FamilyArchitecture, into: Export, statistics: Statistics
) -> dict[str, Any]:
    """Returns config.json: what the library's own loader reads, and what ours does."""
    theirs = into.config(architecture, statistics) if into.config else {}
    return theirs | own_config(into.becomes(architecture), statistics)


def _renamed(
    items: Iterable[tuple[str, Tensor]], architecture: FamilyArchitecture, into: Export
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in items:
        check_finite(name, tensor, "the checkpoint", "export")
        for output in into.outputs(name, tuple(tensor.shape), architecture):
            yield output.name, output.take(tensor)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
