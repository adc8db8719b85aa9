"""Lists, verifies, commits and removes the checkpoints in a run's folder.

checkpoints/step_NNNNNNNN/ is the checkpoint of a step. This folder has manifest.json, and for every
rank rank_RRRRR.safetensors (the rank's tensors) and a receipt rank_RRRRR.json (size and checksums
of the tensors' file). The folder is written as step_NNNNNNNN.START.part, where START is the ID of
the run's start (launch). The folder is renamed when all its files are flushed, so that a folder
without `.part` is complete. If the run keeps the checkpoint of its best evaluation,
checkpoints/best is a link to this checkpoint. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fd_large.checkpoint.lease import Lease
from fd_large.errors import CheckpointError, FDError
from fd_large.files import JSON_BYTES, kind_of, parse_json, retried, write_json
from fd_large.recipes.file_names import CHECKPOINTS

PART = ".part"
OLD = ".old"
"""Suffix of a checkpoint that is being replaced by a new checkpoint of the same step."""
CHUNK = 1 << 24
BEST = "best"
"""Name of the link to the checkpoint of the best evaluation."""
MANIFEST_KEYS = {"update", "world_size", "layout", "samples", "zero_stage"}
DAMAGED = "damaged_"

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint on disk.

    Attributes:
        path: The checkpoint's folder.
        manifest: Contents of manifest.json, without its own checksum.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def update(self) -> int:
        """Number of steps that the run had finished."""
        return self.manifest["update"]

    @property
    def bytes(self) -> int:
        """Total size of the checkpoint's files, in bytes."""
        return sum(path.stat().st_size for path in self.path.iterdir())


def checkpoints_of(folder: Path) -> Path:
    """Returns the folder of the checkpoints of the run in `folder`."""
    return folder / CHECKPOINTS


def name_of(update: int) -> str:
    """Returns the folder name of the checkpoint after `update` steps."""
    return f"step_{update:08d}"


def part_of(folder: Path, update: int, lease: Lease | None) -> Path:
    """Returns the temporary folder in which a checkpoint is written.

    Args:
        folder: The run's folder.
        update: Number of finished steps.
        lease: The right of this launch of the run to write the run's folder; the ID of the launch
            becomes a part of the name. None if no other process can write the folder.
    """
    start = f".{lease.start}" if lease else ""
    return checkpoints_of(folder) / f"{name_of(update)}{start}{PART}"


def file_of(rank: int) -> str:
    """Returns the name of the file with the tensors of rank `rank`."""
    return f"rank_{rank:05d}.safetensors"


def receipt_of(rank: int) -> str:
    """Returns the name of the receipt of rank `rank`.

    The receipt is a file with the size and the checksums of the rank's file of tensors.
    """
    return f"rank_{rank:05d}.json"


def complete(folder: Path) -> list[Stored]:
    """Returns the complete checkpoints of the run in `folder`, oldest first.

    Checkpoints whose manifest.json is missing or damaged are left out.
    """
    read = ((path, manifest_of(path)) for path in renamed(folder))
    return [Stored(path, manifest) for path, manifest in read if manifest is not None]


def renamed(folder: Path) -> list[Path]:
    """Returns the folders of the complete checkpoints of the run in `folder`, oldest first.

    Only names decide whether a folder is complete: the name of an incomplete or replaced folder
    ends in `.part` or `.old`. No file in the folders is read.
    """
    paths = map(checkpoints_of(folder).joinpath, _listed(checkpoints_of(folder)))
    return sorted(p for p in paths if p.match("step_*") and p.suffix not in (PART, OLD))


def manifest_of(path: Path) -> dict[str, Any] | None:
    """Returns the manifest of a checkpoint, without its checksum.

    Args:
        path: Folder of the checkpoint, the link to the best checkpoint, or a temporary folder
            (`.part`).

    Returns: the manifest, or None if manifest.json is missing or damaged, or if its step is not
        that in the folder's name.
    Raises: StorageError, CheckpointError: if manifest.json exists and cannot be read.
    """
    text = _read(path / "manifest.json", _text)
    try:
        manifest = parse_json(text or b"")
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not manifest.keys() >= MANIFEST_KEYS:
        return None
    stored_crc = manifest.pop("crc32", None)
    # `best` is a link to one of them.
    name = path.resolve().name if path.name == BEST else path.name
    named = name.partition(".")[0] == name_of(manifest["update"])
    return manifest if named and stored_crc == _crc_of(manifest) else None


def _crc_of(manifest: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def checksum(path: Path) -> str:
    """Returns the CRC-32 of the file `path` as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def damage(path: Path, rank: int, kinds: Collection[str] | None = None) -> str | None:
    """Checks a rank's file of tensors in a checkpoint against the rank's receipt.

    Args:
        path: The checkpoint's folder.
        rank: The rank that wrote the files.
        kinds: Kinds of tensors whose bytes are checked, such as "master" (master weights) or "ema"
            (averaged weights); None to check the whole file. The whole file is also checked if the
            receipt has no checksums by kind.

    Returns: a message about the damage, or None if there is none.
    Raises: StorageError, CheckpointError: if a file exists but cannot be read, which is no damage.
    """
    tensors, receipt = path / file_of(rank), path / receipt_of(rank)
    try:
        expected = parse_json(_read(receipt, _text) or b"")
        size, expected_sums = expected["bytes"], {"file": expected["crc32"]}
        if kinds is not None and "kinds" in expected:
            expected_sums = {kind: crc for kind, crc in expected["kinds"].items() if kind in kinds}
            expected_sums["header"] = expected["header"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{receipt.name} is missing or damaged"
    state = _read(tensors, lambda file: _state(file, size, expected_sums))
    if state is None:
        return f"{tensors.name} is missing"
    num_bytes, sums = state
    if num_bytes != size:
        return f"{tensors.name} has {num_bytes} bytes, expected {size}"
    for part, crc in expected_sums.items():
        if part not in sums:
            return f"{tensors.name} is damaged: it cannot be read as a file of tensors"
        if sums[part] != crc:
            of = "" if part == "file" else f" of its {part}"
            return f"{tensors.name} has checksum {sums[part]}{of}, expected {crc}"
    return None


def _state(file: Path, size: int, parts: Collection[str]) -> tuple[int, dict[str, str]]:
    """Returns the size of a file of tensors, and checksums of parts of it.

    Args:
        file: The file.
        size: The expected size in bytes.
        parts: "file" for the checksum of the whole file alone. Otherwise "header" and kinds of
            tensors, each of which is the part of the tensors' names before the first dot, such as
            "master".

    Returns: the size in bytes, and {part: its checksum}. The dict is empty if the size is not
        `size` or the file has no valid header. A kind of which the file has no tensor is not in the
        dict.
    """
    status = file.stat()
    num_bytes = status.st_size
    if num_bytes != size or not stat.S_ISREG(status.st_mode):
        return num_bytes, {}
    if "file" in parts:
        return num_bytes, {"file": checksum(file)}
    # Importing torch takes seconds.
    from fd_large.checkpoint.tensor_file import TensorFile

    try:
        opened = TensorFile(file)
    except ValueError:
        return num_bytes, {}
    try:
        sums = opened.checksum([part for part in parts if part != "header"])
        return num_bytes, {**sums.kinds, "header": sums.header}
    finally:
        opened.close()


def _text(file: Path) -> bytes:
    """Returns the first `JSON_BYTES` bytes of `file`, and does not block on a named pipe.

    Whether the file is a named pipe is not looked up first, since another request for each file of
    each rank would keep a file server busy.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as text:
        return text.read(JSON_BYTES) or b""


def _listed(folder: Path) -> list[str]:
    """Returns the names in the folder `folder`, or an empty list if `folder` does not exist."""
    return _read(folder, os.listdir) or []


def _read(file: Path, action: Callable[[Path], T]) -> T | None:
    """Returns the result of `action` for the file or folder `file`, or None if it does not exist.

    Args:
        file: The file or folder.
        action: Function that reads `file`. It may be called again after a failed read.

    Raises: StorageError, CheckpointError: if `file` exists and cannot be read.
    """
    try:
        return retried(lambda: action(file), file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read; got {error.strerror}, expected a readable file. Correct the "
            "permissions of the file or its folder."
        ) from error


def verify(stored: Stored, kinds: Collection[str] | None = None) -> list[str]:
    """Checks the files of all ranks in a checkpoint.

    Args:
        stored: The checkpoint.
        kinds: Kinds of tensors whose bytes are checked, such as "master" (master weights) or "ema"
            (averaged weights); None to check the whole files.

    Returns: a message for each damaged file; empty if no file is damaged.
    """
    problems = (damage(stored.path, rank, kinds) for rank in range(stored.manifest["world_size"]))
    return [problem for problem in problems if problem]


def set_aside(folder: Path, names: list[str]) -> None:
    """Renames damaged checkpoints, which stay for inspection but no longer count as checkpoints.

    Only rank 0 calls this function.

    Args:
        folder: The run's folder.
        names: Folder names of the checkpoints.
    """
    for name in names:
        path = checkpoints_of(folder) / name
        aside = path.with_name(DAMAGED + name)
        remove(aside)
        retried(partial(_rename_if_there, path, aside), path)


def _rename_if_there(path: Path, aside: Path) -> None:
    if kind_of(path):
        path.rename(aside)


def commit(part: Path, manifest: dict[str, Any], lease: Lease | None = None) -> Path:
    """Writes the manifest of a checkpoint, and completes the checkpoint by an atomic rename.

    Only rank 0 calls this function, when all ranks have written their files. A launch that no
    longer owns the run commits nothing. If the lease is lost only after it was checked, the rename
    fails, because the new owner's `sweep` has removed the temporary folder.

    Args:
        part: The temporary folder (`.part`) of the checkpoint.
        manifest: Contents of manifest.json, without its own checksum.
        lease: The right of this launch of the run to write the run's folder; None if no other
            process can write the folder.

    Returns: the folder of the complete checkpoint.
    Raises:
        OSError, StorageError: if a rank's file is missing, the disk is full or does not answer, or
            the run has a new owner.
    """
    if lease:
        manifest = {**manifest, "start": lease.start}
    retried(lambda: _check_all_there(part, manifest["world_size"]), part)
    retried(lambda: _write_manifest(part, {**manifest, "crc32": _crc_of(manifest)}), part)
    final = part.with_name(name_of(manifest["update"]))
    old = final.with_name(final.name + OLD)
    if lease:
        lease.must_own()

    def rename() -> None:
        if not kind_of(part) and _crc_of(manifest_of(final) or {}) == _crc_of(manifest):
            return  # An earlier try has renamed it, and its answer was lost.
        if kind_of(part) and kind_of(final):  # A run that went back is at the same step again.
            remove(old)
            final.rename(old)
        part.rename(final)

    try:
        retried(rename, final)
    except (OSError, FDError):
        with suppress(OSError):
            if not kind_of(final):
                old.rename(final)
        raise
    remove(old)
    retried(lambda: flush_folder(final.parent), final.parent)
    return final


def _check_all_there(part: Path, ranks: int) -> None:
    for rank in range(ranks):
        for name in (file_of(rank), receipt_of(rank)):
            if kind_of(part / name) != "file":
                raise OSError(f"{part / name} is missing: do all nodes share this folder?")


def _write_manifest(part: Path, manifest: dict[str, Any]) -> None:
    write_json(part / "manifest.json", manifest)
    flush_folder(part)


def amend(path: Path, entries: dict[str, Any], lease: Lease | None = None) -> None:
    """Adds or replaces entries of a complete checkpoint's manifest, in an atomic step.

    Only rank 0 calls this function.

    Args:
        path: The checkpoint's folder.
        entries: The new entries.
        lease: The right of this launch of the run to write the run's folder; None if no other
            process can write the folder.

    Raises:
        OSError, StorageError, CheckpointError: if the manifest cannot be read or written, or the
            run has a new owner.
    """
    if lease:
        lease.must_own()
    manifest = manifest_of(path)
    if manifest is None:
        raise OSError(f"{path / 'manifest.json'} is missing or damaged")
    manifest |= entries
    whole = {**manifest, "crc32": _crc_of(manifest)}
    retried(lambda: write_json(path / "manifest.json", whole), path)


def best_of(folder: Path) -> Path | None:
    """Returns the folder of the checkpoint of the best evaluation of a run.

    Args:
        folder: The run's folder.

    Returns: the checkpoint's folder, or None if there is no such checkpoint.
    """
    link = checkpoints_of(folder) / BEST
    return link.resolve() if link.is_symlink() and kind_of(link) else None


def set_best(folder: Path, update: int, lease: Lease | None = None) -> bool:
    """Makes the link `best` point to the checkpoint after `update` steps.

    Only rank 0 calls this function. If the checkpoint does not exist, the link stays as it was.

    Args:
        folder: The run's folder.
        update: Number of finished steps of the checkpoint.
        lease: The right of this launch of the run to write the run's folder; None if no other
            process can write the folder.

    Returns: whether the checkpoint exists.
    Raises: OSError, StorageError: if the link cannot be made, or the run has a new owner.
    """
    if lease:
        lease.must_own()
    link, name = checkpoints_of(folder) / BEST, name_of(update)
    if kind_of(link.with_name(name)) != "folder":
        return False

    def replace() -> None:
        aside = link.with_name(f"{BEST}.new")
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        aside.replace(link)

    retried(replace, link)
    return True


def prune(
    folder: Path, *, keep_last: int, keep_every: int, lease: Lease | None = None
) -> list[Path]:
    """Removes old checkpoints of a run, but not the checkpoint of the best evaluation.

    Only rank 0 calls this function.

    Args:
        folder: The run's folder.
        keep_last: Number of newest checkpoints to keep, at least one.
        keep_every: Checkpoints whose step is a multiple of this number are also kept; 0 for none.
        lease: The right of this launch of the run to write the run's folder; a launch that no
            longer owns the folder removes nothing. None if no other process can write the folder.

    Returns: the removed folders.
    """
    removed = []
    stored, best = complete(folder), best_of(folder)
    for old in stored[: max(0, len(stored) - max(1, keep_last))]:
        if keep_every and old.update % keep_every == 0:
            continue
        if best and old.path.name == best.name:
            continue
        if lease and not lease.owned():
            break
        _remove(old.path)
        removed.append(old.path)
    return removed


def _remove(path: Path) -> None:
    """Removes the folder `path` of a checkpoint, after renaming it.

    Without the new name, a folder that is removed only in part would count as a complete
    checkpoint.
    """
    aside = path.with_name(f"removed_{path.name.removesuffix(PART)}{PART}")
    remove(aside)
    path.rename(aside)
    remove(aside)


def sweep(folder: Path) -> None:
    """Removes temporary folders that a killed launch of the run left in its checkpoints' folder.

    A `commit` that was interrupted while it replaced a checkpoint is finished. This function must
    be called before any rank writes a checkpoint.

    Args:
        folder: The run's folder.
    """
    names = [checkpoints_of(folder) / name for name in _listed(checkpoints_of(folder))]
    for path in names:
        if path.suffix == OLD:
            retried(partial(_finish_replacing, path), path)
    for path in names:
        if path.suffix != PART:
            continue
        if path.name.startswith("removed_"):
            remove(path)
            continue
        # An earlier start that is still alive may commit this folder just now, or never.
        with suppress(FileNotFoundError):
            retried(partial(_remove, path), path)


def _finish_replacing(old: Path) -> None:
    """Finishes a `commit` that replaced a checkpoint and was killed between its two renames.

    If the new checkpoint is complete, it gets its final name and the old checkpoint is removed.
    Otherwise the old checkpoint gets its name back.

    Args:
        old: Folder of the old checkpoint, with the suffix `OLD`.
    """
    final = old.with_suffix("")
    if not kind_of(final):
        names = [name for name in _listed(old.parent) if name.startswith(f"{final.name}.")]
        parts = [old.with_name(name) for name in names if name.endswith(PART)]
        next((part for part in parts if _is_whole(part)), old).rename(final)
    remove(old)


def _is_whole(part: Path) -> bool:
    manifest, names = manifest_of(part), set(_listed(part))
    ranks = range(manifest["world_size"]) if manifest else ()
    return bool(manifest) and all({file_of(r), receipt_of(r)} <= names for r in ranks)


def remove(folder: Path) -> None:
    """Removes the folder `folder`, and ignores errors.

    If a part of the folder is left, the run's next launch removes it (`sweep`).
    """
    with suppress(OSError):  # Even `ignore_errors` lets some through.
        shutil.rmtree(folder, ignore_errors=True)


def flush_folder(path: Path) -> None:
    """Flushes the folder `path` to disk, so that renames and new files in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
