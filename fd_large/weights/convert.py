"""Writes a model's weights in our own format, or with the official or timm's tensor names.

All tensors of the model are in memory at once, whereas the export of a run (export.py) writes one
tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fd_large.backbones.exports import Export
from fd_large.backbones.registry import family_of
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import outputs
from fd_large.errors import WeightsError, nearest
from fd_large.files import check_out, new_folder, replacing, write_json
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.export import NAME
from fd_large.weights.sidecar import own_config

FORMATS = ("fd", "official", "timm")


def write(
    items: Iterable[tuple[str, Tensor]],
    architecture: FamilyArchitecture,
    to: str,
    out: str | Path,
    *,
    statistics: Statistics | None = None,
) -> Path:
    """Writes a model's weights in a format; returns the path of the weights file.

    Args:
        items: (our name, tensor) of the whole model.
        to: "fd" writes a folder with our names and a complete config.json, "official" a file with
            the names of the official repositories, "timm" a file with timm's names.
        out: A new folder for "fd"; a new .safetensors or .pth file for "official" and "timm".
        statistics: Image statistics that the weights were trained with; None if unknown.

    Raises:
        WeightsError: If the format does not exist or cannot hold the model, or the file cannot be
            written.
        ConfigError: If `out` already exists.
    """
    out = Path(out)
    if to not in FORMATS:
        raise WeightsError(
            f"weights convert: unknown format; got {to!r}, {nearest(to, FORMATS)}. Use one of "
            "these."
        )
    check_out(out, where="weights convert")
    if to != "fd" and out.suffix not in (".safetensors", ".pth"):
        raise WeightsError(
            f"weights convert: {out}: unknown kind of file; got {out.suffix!r}, expected a name "
            "that ends in .safetensors or .pth. Rename the output."
        )
    if to == "official" and family_of(architecture).published is None:
        raise WeightsError(
            f"weights convert: no official repository has this model; got "
            f"{architecture.own_name}, expected a ViT, BEiT, Swin or SwinV2. Convert the weights "
            "to fd or timm."
        )
    theirs = _timm(architecture) if to == "timm" else None
    rows = theirs.rows(architecture) if theirs else ()
    renamed = {
        output.name: output.take(tensor).contiguous()
        for name, tensor in items
        for output in outputs(name, tuple(tensor.shape), rows)
    }
    if theirs:
        renamed |= theirs.added(architecture)
    try:
        if to == "fd":
            with new_folder(out, where="weights convert") as part:
                _save(renamed, part / NAME)
                write_json(part / "config.json", own_config(architecture, statistics))
            return out / NAME
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as aside:
            if out.suffix == ".pth":
                torch.save({"model": renamed} if to == "official" else renamed, aside)
            else:
                _save(renamed, aside)
        return out
    # A full disk is another error with torch, and with safetensors.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"weights convert: {out}: cannot be written; got {error}, expected a path with room "
            "for the weights. Choose another path."
        ) from error


def _timm(architecture: FamilyArchitecture) -> Export:
    """Returns how a model is written with timm's tensor names.

    Raises: WeightsError: if timm has no model of this family, or none with all parts of
        `architecture`.
    """
    export = family_of(architecture).exports.get("timm")
    lacks = export.lacks_place(architecture) if export else "timm has no model of this family"
    if export is None or lacks:
        raise WeightsError(
            f"weights convert: timm has no such model; got a {architecture.family} model "
            f"({lacks}), expected a model that timm has. Convert the weights to fd or official."
        )
    return export


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    # Copies of a shared bias share memory, which the format does not know.
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in addresses:
            tensors[name] = tensor.clone()
        addresses.add(tensor.data_ptr())
    save_file(tensors, file, metadata={"format": "pt"})
