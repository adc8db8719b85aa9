"""Opens weights files without executing anything in them: safetensors and torch files."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fd_large.errors import WeightsError
from fd_large.weights.package import locate


class SafetensorsFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name; each is read when asked for."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._file.get_slice(name).get_shape())


def read(path: str | Path, *, where: str = "weights") -> Mapping[str, Tensor]:
    """Opens a weights file and takes off its wrapping.

    Safetensors are read lazily; torch files are mapped into memory where their format allows it.
    TorchScript archives (OpenAI CLIP's) give their state dict.

    Args:
        path: A file, or `package:NAME` (see package.py).
        where: What the user set, for messages.

    Raises: WeightsError: if the file is missing, damaged, of another kind, or holds objects that
        only arbitrary code could restore.
    """
    path = locate(path, where=where)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise WeightsError(
            f"{where}: {path}: no such file; got {got}, expected a .safetensors, .pt or .pth file. "
            "Check the path."
        )
    try:
        if path.suffix == ".safetensors":
            tensors = SafetensorsFile(path)
            strip = all(name.startswith("module.") for name in tensors)
            return unwrap(tensors, where) if strip else tensors
        return unwrap(_torch_file(path, where), where)
    except SafetensorError as error:
        raise _damaged(path, error, where) from error


def unwrap(contents: Any, where: str = "weights") -> dict[str, Tensor]:
    """Returns the (name, tensor) pairs inside a file's wrapping.

    Descends through `model`, `state_dict` and `student`, then takes off a common `module.` and
    `backbone.`.

    Raises: WeightsError: if no tensors are found, or something else stands among them.
    """
    while isinstance(contents, Mapping):
        inner = [contents[k] for k in ("model", "state_dict", "student") if k in contents]
        if not inner or not isinstance(inner[0], Mapping):
            break
        contents = inner[0]
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(
            f"{where}: no tensors by name in the file; got {type(contents).__name__}, expected a "
            "mapping of names to tensors. Save the net's state_dict()."
        )
    strange = sorted(str(name) for name, value in contents.items() if not torch.is_tensor(value))
    if strange:
        raise WeightsError(
            f"{where}: not only tensors in the file; got {', '.join(strange[:5])}, expected a "
            "mapping of names to tensors, alone or under model, state_dict or student. Save the "
            "net's state_dict()."
        )
    for prefix in ("module.", "backbone."):
        named = [name for name in contents if not name.startswith(("head.", "head_dense."))]
        if named and all(name.startswith(prefix) for name in named):
            contents = {name.removeprefix(prefix): t for name, t in contents.items()}
    return dict(contents)


def _torch_file(path: Path, where: str) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and _is_torchscript(path):
            with warnings.catch_warnings():
                # Deprecated, but the only reader of the files that OpenAI publishes.
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(str(path), map_location="cpu").state_dict()
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            culprit = str(error).split("GLOBAL ")[-1].split()[0]
            raise WeightsError(
                f"{where}: {path}: holds objects that only running code of the file could restore; "
                f"got {culprit}, expected tensors. Where the file was made, save its state dict "
                "alone with torch.save."
            ) from error
        raise _damaged(path, error, where) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error, where) from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _damaged(path: Path, error: Exception, where: str) -> WeightsError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"{where}: {path}: damaged, cut short, or not a weights file; got {path.stat().st_size} "
        f"bytes ({reason}), expected safetensors or a torch file. Fetch the file again."
    )
