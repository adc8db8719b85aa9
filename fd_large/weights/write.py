"""Weights into files that others read: our own export, the official names, timm's.

A writer takes the (name, tensor) of a model in our names, whoever supplies them. The export of a run
(export.py) streams; this writes a model that fits in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError, nearest
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.beside import OWN

FORMATS = {
    "fd": "a folder with this project's names and a config.json that tells everything",
    "official": "Swin-Transformer's, DINO's or Feature-Distillation's names, one file",
    "timm": "timm's names (ViT, BEiT, Swin, SwinV2), one file",
}


def write(
    items: Iterable[tuple[str, Tensor]],
    architecture: FamilyArchitecture,
    to: str,
    out: str | Path,
    *,
    statistics: Statistics | None = None,
) -> Path:
    """Writes a net's weights; returns the file.

    Args:
        items: In our names.
        architecture: Of the model, whole.
        to: One of FORMATS.
        out: A new folder for "fd"; a new .safetensors or .pth file for the others.
        statistics: That the weights were trained with.

    Raises: WeightsError: if there is no such format, the format lacks a part of the model, or
        something stands at `out`.
    """
    out = Path(out)
    if to not in FORMATS:
        raise WeightsError(
            f"weights convert: no such format; got {to!r}, {nearest(to, FORMATS)}. Use one of "
            "these."
        )
    if out.exists():
        raise WeightsError(
            f"weights convert: {out}: something is there already; got a "
            f"{'folder' if out.is_dir() else 'file'}, expected a new name. Move it, or name "
            "another."
        )
    if to != "fd" and out.suffix not in (".safetensors", ".pth"):
        raise WeightsError(
            f"weights convert: {out}: what kind of file is not clear; got {out.suffix!r}, expected "
            "a name that ends in .safetensors or .pth. Rename it."
        )
    if to == "timm":
        _check_timm(architecture)
    renamed = {
        (timm_name(name, architecture) if to == "timm" else name): tensor.contiguous()
        for name, tensor in items
    }
    file = out / "model.safetensors" if to == "fd" else out
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.part")
        if file.suffix == ".pth":
            torch.save({"model": renamed} if to == "official" else renamed, aside)
        else:
            # Copies of a shared bias share memory, which the format does not know.
            save_file(_unshared(renamed), aside, metadata={"format": "pt"})
        if to == "fd":
            (out / "config.json").write_text(json.dumps(config(architecture, statistics), indent=1))
        aside.rename(file)
    # A full disk is another error with torch, and with safetensors.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"weights convert: {out}: cannot be written; got {error}, expected a place with room "
            "for the weights. Choose another."
        ) from error
    return file


def config(architecture: FamilyArchitecture, statistics: Statistics | None) -> dict:
    """The config.json of our own export, which `beside.py` reads."""
    own: dict = {"architecture": architecture.values()}
    if statistics is not None:
        own |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    return {OWN: own}


def timm_name(name: str, architecture: FamilyArchitecture) -> str:
    """Our name of a tensor as timm has it."""
    merging = re.match(r"layers\.(\d+)\.downsample\.", name)
    if merging:
        return f"layers.{int(merging[1]) + 1}.downsample.{name[merging.end() :]}"
    if architecture.family == "vit" and not is_beit(architecture):
        return name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
    return name


def is_beit(architecture: FamilyArchitecture) -> bool:
    """Whether timm has the ViT as a BEiT: relative positions, biases of query and value."""
    return architecture.relative_position != "none" or architecture.qkv_bias == "qv"


def lacks_in_timm(a: FamilyArchitecture) -> str:
    """Says what of a model timm's of the same family has not; empty: it has all."""
    if a.family == "vit" and is_beit(a):
        fits = a.qkv_bias == "qv" and a.class_token and not a.pre_norm_layer and a.patch_bias
        return "" if fits else "a BEiT has q and v biases, a class token, and no norm before"
    if a.family == "vit" and a.qkv_bias == "qkv":
        return "its ViT has one vector for the three biases"
    if a.family == "swinv2" and a.extra_norm_every:
        return "its SwinV2 has no norms on the main path"
    if a.family == "swinv2" and a.shared_position_bias:
        return "its SwinV2 has a position bias per block"
    if a.family.startswith("swin") and a.absolute_position:
        return "its Swin models have no absolute positions"
    return ""


def _check_timm(a: FamilyArchitecture) -> None:
    if lacks := lacks_in_timm(a):
        raise WeightsError(
            f"weights convert: timm has no such model; got a {a.family} model, expected one that timm "
            f"has: {lacks}. Convert it to fd or official."
        )


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors
