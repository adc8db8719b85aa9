"""Opens weights files, safetensors and torch files, without running code from them.

Tensors are read on access. Torch files are memory-mapped, so that the ranks of a node share one
copy in the page cache.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fd_large import files, mapped_files
from fd_large.errors import FDError, WeightsError, first_line
from fd_large.files import kind_of
from fd_large.recipes.file_names import CHECKPOINTS
from fd_large.weights import torch_files
from fd_large.weights.libraries import LIBRARIES
from fd_large.weights.unpickle import NAME_LENGTH, RefusedError

# The models in a file with several, as a source names them after a `#`: FILE#teacher.
PARTS = ("student", "teacher", "projector")
OTHER = {"student": "teacher", "teacher": "student"}
"""{part: other part} of a training file that has a student and a teacher."""

# Hugging Face's and open_clip's names of weights, in the order in which a folder is searched.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_INDEX = ".index.json"
# The formats of exports that hold a graph and no tensors, by the ending of the file.
_GRAPHS = {Path(made.graph).suffix: made for made in LIBRARIES.values() if made.graph}
# Bounds of the JSON that comes with weights. The largest published indices have 10 MB.
_JSON_BYTES, _INDEX_BYTES, _JSON_VALUES = 4 << 20, 64 << 20, 1_000_000
# Bounds of weights files. The largest models of images have a few thousand tensors.
_HEADER_BYTES, _NAMES, _WRAPPINGS = 16 << 20, 50_000, 8
# Largest number of characters of a name, and of a library's reason, in a message.
_NAME_SHOWN, _REASON_SHOWN = 100, 200
# Keys are the names in safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class _Slice(NamedTuple):
    """A tensor in an open safetensors file that is not read yet."""

    file: Any
    name: str

    def header(self) -> Any:
        """Returns safetensors' object that states the tensor's shape and dtype."""
        return self.file.get_slice(self.name)


class Tensors(Mapping[str, Tensor]):
    """Mapping of names to the tensors of one or several files; a tensor is read on access.

    Attributes:
        path: The file, or the index of several files; None for tensors of a library or checkpoint.
        wrapping: Keys of the nested dicts that hold the tensors, outermost first.
        other_part: "student" or "teacher", if the file also has the tensors of that model, which
            are left out here; else "".
    """

    def __init__(
        self,
        entries: Mapping[str, Tensor | _Slice],
        path: Path | None = None,
        wrapping: tuple[str, ...] = (),
        other_part: str = "",
    ):
        self._entries, self.path, self.wrapping = dict(entries), path, wrapping
        self.other_part = other_part

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.file.get_tensor(entry.name) if isinstance(entry, _Slice) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the tensor `name` without reading the tensor."""
        entry = self._entries[name]
        return tuple(entry.header().get_shape() if isinstance(entry, _Slice) else entry.shape)

    def dtype(self, name: str) -> torch.dtype | str:
        """Returns the dtype of the tensor `name` without reading it, as text if torch lacks it."""
        entry = self._entries[name]
        if isinstance(entry, _Slice):
            return DTYPES.get(entry.header().get_dtype(), entry.header().get_dtype())
        return entry.dtype

    def dtypes(self, names: Iterable[str]) -> tuple[str, ...]:
        """Returns the sorted names of the dtypes, such as "float32", of the tensors `names`."""
        return tuple(sorted({str(self.dtype(name)).removeprefix("torch.") for name in names}))

    def under(self, names: Mapping[str, str]) -> Tensors:
        """Returns the tensors of `names`, {new name: old name}, under their new names."""
        entries = {new: self._entries[old] for new, old in names.items()}
        return Tensors(entries, self.path, self.wrapping, self.other_part)


def read_json(path: Path, *, where: str = "weights") -> Any:
    """Reads untrusted JSON within bounds of time and memory.

    Args:
        path: A configuration of at most 4 MB, or an index (`*.index.json`) of at most 64 MB.

    Raises: WeightsError: if the file is larger, not JSON, nested too deeply, or contains NaN or
        infinity.
    """
    return files.read_json(
        path,
        where=where,
        remedy="Fetch the file again, or move it away.",
        of=WeightsError,
        finite=True,
        max_bytes=_INDEX_BYTES if path.name.endswith(_INDEX) else _JSON_BYTES,
        max_values=_JSON_VALUES,
    )


def split_part(source: str | Path, *, where: str = "weights") -> tuple[str, str]:
    """Splits a `source` FILE#PART into (file, part).

    The part is "" if the source has none, or if a file or folder has the whole name, with the `#`.

    Raises: WeightsError: if PART is not one of `PARTS`, such as "student".
    """
    name, mark, part = str(source).rpartition("#")
    if not mark or kind_of(source):
        return str(source), ""
    if part not in PARTS:
        raise WeightsError(
            f"{where}: unknown part of a weights file; got #{part}, expected one of "
            f"{', '.join('#' + known for known in PARTS)}. Name one of these parts, or leave out "
            "the part."
        )
    return name, part


def read(path: str | Path, *, where: str = "weights", part: str = "") -> Tensors:
    """Opens a weights file and returns its tensors, without the dicts around them.

    For a TorchScript archive (OpenAI CLIP's) the tensors are those of its state dict.

    Args:
        path: A weights file, an index of several files, or a folder that contains a file or index.
        part: "student" or "teacher", for a file with dicts of these two names; "" in such a file
            means the teacher, which DINO, EsViT and iBOT evaluate (`--checkpoint_key`).

    Raises: WeightsError: if the file is missing, damaged, of another kind, or contains objects that
        only arbitrary code could restore.
    """
    path = file_of(Path(path), where=where)
    try:
        if path.name.endswith(_INDEX):
            entries = _sharded(path, where)
        elif path.suffix == ".safetensors":
            entries = _safetensors(path)
        else:
            contents = _torch_file(path, where)
            has_both = _has_both(contents)
            part = part or ("teacher" if has_both else "")
            tensors, wrapping = unwrap(contents, where, part)
            return Tensors(tensors, path, wrapping, OTHER.get(part, "") if has_both else "")
        return Tensors(_without_prefixes(entries, where), path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error, where) from error


def file_of(path: Path, *, where: str = "weights") -> Path:
    """Returns the path of a weights file or index: `path`, or the file inside the folder `path`.

    Raises: WeightsError: if there is no such file, or `path` is a run's folder or a graph.
    """
    kind = kind_of(path, where=where, of=WeightsError)
    if kind == "file" and path.suffix not in _GRAPHS:
        return path
    if kind_of(path / CHECKPOINTS) == "folder":
        raise WeightsError(
            f"{where}: {path}: the folder of a run; got a folder, expected a weights file. Export "
            "the student first."
        )
    for name in _FOLDER_FILES:
        if kind_of(path / name) == "file":
            return path / name
    for suffix, library in _GRAPHS.items():
        if kind_of(path / library.graph) == "file" or (path.suffix == suffix and kind == "file"):
            raise WeightsError(
                f"{where}: {path}: contains a runnable model instead of named weights; got "
                f"{library.holds}, expected a file or folder of weights. Export the run again "
                "with --to fd, and name that folder."
            )
    got = f"a folder without {', '.join(_FOLDER_FILES)}" if kind == "folder" else "nothing there"
    raise WeightsError(
        f"{where}: {path}: no such file; got {got}, expected a .safetensors, .pt or .pth file, or "
        "a folder of Hugging Face. Check the path."
    )


def files_of(path: Path) -> list[Path]:
    """Returns the paths of all files of weights: an index (.json) and its files, or [path].

    Raises: WeightsError: if the index cannot be read.
    """
    if path.suffix != ".json":
        return [path]
    names = read_json(path)["weight_map"].values()
    return [path, *(path.parent / Path(name).name for name in sorted(set(names)))]


def unwrap(
    contents: Any, where: str = "weights", part: str = ""
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns {name: tensor} of a torch file, and the keys of the nested dicts around the tensors.

    The tensors are searched under the keys `model`, `state_dict` and `student` of nested dicts, and
    before these under the key `part` ("student" or "teacher") unless it is "". Then the prefixes
    `module.` and `backbone.` are removed if all names, except those of a head, have them.

    Raises: WeightsError: if there are no tensors, or other values besides dense tensors.
    """
    tensors, wrapping = _unwrapped(contents, where, part)
    return _without_prefixes(tensors, where), wrapping


def _unwrapped(
    contents: Any, where: str, part: str = ""
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    wrapping: list[str] = []
    keys = (part, "model", "state_dict", "student") if part else ("model", "state_dict", "student")
    while isinstance(contents, Mapping) and len(wrapping) < _WRAPPINGS:
        key = next((k for k in keys if isinstance(contents.get(k), Mapping)), None)
        if key is None:
            break
        wrapping.append(key)
        contents = contents[key]
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(
            f"{where}: no named tensors in the file; got {type(contents).__name__}, expected a "
            "mapping of names to tensors. Save the model's state_dict()."
        )
    strange = sorted(
        str(name)[:_NAME_SHOWN]
        for name, value in contents.items()
        if not (isinstance(name, str) and torch.is_tensor(value) and _has_values(value))
    )
    if strange:
        raise WeightsError(
            f"{where}: holds other values than dense tensors; got {', '.join(strange[:5])}, "
            "expected a mapping of names to tensors, alone or under model, state_dict, student or "
            "teacher. Save the model's state_dict()."
        )
    return contents, tuple(wrapping)


def _has_both(contents: Any) -> bool:
    """Whether a file has dicts of a student and a teacher, as in DINO's training."""
    if not isinstance(contents, Mapping) or "model" in contents or "state_dict" in contents:
        return False
    return all(isinstance(contents.get(part), Mapping) for part in ("student", "teacher"))


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _without_prefixes(contents: Mapping[str, Any], where: str) -> dict[str, Any]:
    longest = max(map(len, contents), default=0)
    if len(contents) > _NAMES or longest > NAME_LENGTH:
        raise WeightsError(
            f"{where}: not a model's names; got {len(contents):,} tensors, the longest name of "
            f"{longest:,} characters, expected at most {_NAMES:,} and "
            f"{NAME_LENGTH}. Use the weights of another model."
        )
    for prefix in ("module.", "backbone."):
        named = [name for name in contents if not name.startswith(("head.", "head_dense."))]
        if named and all(name.startswith(prefix) for name in named):
            contents = {name.removeprefix(prefix): t for name, t in contents.items()}
    return dict(contents)


def _safetensors(path: Path) -> dict[str, _Slice]:
    with path.open("rb") as begin:
        header = int.from_bytes(begin.read(8), "little")
    if _HEADER_BYTES < header < path.stat().st_size:
        raise SafetensorError(f"a header of {header:,} bytes, more than {_HEADER_BYTES:,}")
    mapped_files.opening(path)
    file = safe_open(path, framework="pt")
    return {name: _Slice(file, name) for name in file.keys()}  # noqa: SIM118


def _sharded(path: Path, where: str) -> dict[str, Any]:
    """Returns {name: tensor} of all files that the index `path` names.

    Raises: WeightsError: if the index is damaged, or a file or tensor is missing.
    """
    try:
        index = read_json(path, where=where)["weight_map"]
        files = sorted(set(map(str, index.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error, where) from error
    entries: dict[str, Any] = {}
    for name in files:
        file = path.parent / Path(name).name
        if kind_of(file, where=where, of=WeightsError) != "file":
            raise WeightsError(
                f"{where}: {path}: one of its files is missing; got no {name[:_NAME_SHOWN]}, "
                f"expected all {len(files)} files beside the index. Fetch the files again."
            )
        if file.suffix == ".safetensors":
            entries |= _safetensors(file)
        else:
            entries |= _unwrapped(_torch_file(file, where), where)[0]
    absent = sorted(index.keys() - entries.keys())
    if absent:
        raise WeightsError(
            f"{where}: {path}: tensors of the index are in none of its files; got no "
            f"{str(absent[0])[:_NAME_SHOWN]}"
            f"{f' and {len(absent) - 1} more' if len(absent) > 1 else ''}, expected "
            f"{len(index)} tensors. Fetch the files again."
        )
    return entries


def _torch_file(path: Path, where: str) -> Any:
    try:
        mapped_files.opening(path)
        return torch_files.load(path)
    except RefusedError as error:
        raise WeightsError(
            f"{where}: {path}: contains objects that need code from the file to be run; got"
            f" {error}, expected tensors. If you trust the file, load it where its code is "
            "installed, and save the state dict alone: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)."
        ) from error
    except _DAMAGES as error:
        raise _damaged(path, error, where) from error


# Errors that files raise which were cut short or altered.
_DAMAGES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def _damaged(path: Path, error: Exception, where: str) -> FDError:
    if isinstance(error, OSError) and error.errno in files.REFUSED:
        return files.unusable(where, error, error.filename or path, of=WeightsError)
    reason = first_line(error)[:_REASON_SHOWN]
    return WeightsError(
        f"{where}: {path}: damaged, cut short, or not a weights file; got {path.stat().st_size} "
        f"bytes ({reason}), expected safetensors or a torch file. Fetch the file again."
    )
