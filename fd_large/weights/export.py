"""A student into a folder that others load: tensors one at a time, a config, a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.backbones.statistics import Statistics
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import check_finite
from fd_large.weights.export_config import EXPORTS, configuration
from fd_large.weights.export_names import outputs
from fd_large.weights.shards import write_shards
from fd_large.weights.translation import Shape

CARD = "README.md"


def export(
    items: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    architecture: FamilyArchitecture,
    to: str,
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
        shapes: Of all of them.
        architecture: Of the student, with the image size that it was trained at.
        to: One of EXPORTS, which has such a model (`export_config.check`).
        out: Does not exist.
        statistics: By which the student's images are normalised.
        shard_size: Most bytes of a file.
        card: Text of the model card.

    Raises: ConfigError: if something stands at `out`, or it cannot be written; WeightsError: for a
        tensor that holds NaN or infinity.
    """
    assert to in EXPORTS, to
    if out.exists():
        raise ConfigError(
            f"export: {out}: something is there already; got a "
            f"{'folder' if out.is_dir() else 'file'}, expected a new name. Move it, or name "
            "another."
        )
    theirs = [
        (output.name, output.shape)
        for name, shape in shapes.items()
        for output in outputs(name, shape, architecture, to)
    ]
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        files = write_shards(part, theirs, _renamed(items, architecture, to), shard_size)
        _write_json(part / "config.json", configuration(architecture, to, statistics))
        if to == "hf":
            _write_json(part / "preprocessor_config.json", _preprocessor(architecture, statistics))
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


def _renamed(
    items: Iterable[tuple[str, Tensor]], architecture: FamilyArchitecture, to: str
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in items:
        check_finite(name, tensor, "the checkpoint", "export")
        for output in outputs(name, tuple(tensor.shape), architecture, to):
            yield output.name, output.take(tensor)


def _preprocessor(architecture: FamilyArchitecture, statistics: Statistics) -> dict[str, Any]:
    side = {"height": architecture.image_size, "width": architecture.image_size}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 3,  # Bicubic.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
