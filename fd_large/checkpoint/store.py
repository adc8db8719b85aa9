"""The folder of a run's checkpoints: which are complete, which are sound, which may be removed.

checkpoints/step_NNNNNNNN/ holds rank_RRRRR.safetensors and rank_RRRRR.json (size and checksum of
that file, written by its rank) for every rank, and manifest.json. It is written as
step_NNNNNNNN.START.part, START the id of the run's start, and renamed when all is flushed: a folder
without `.part` is complete. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_large.atomic_files import write_json
from fd_large.checkpoint.lease import Lease

PART = ".part"
OLD = ".old"
"""A checkpoint that is being replaced by one of the same step."""
CHUNK = 1 << 24
MANIFEST_KEYS = {"update", "world_size", "layout", "samples", "zero_stage"}
DAMAGED = "damaged_"


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def update(self) -> int:
        """Number of finished steps."""
        return self.manifest["update"]

    @property
    def bytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(path.stat().st_size for path in self.path.iterdir())


def checkpoints_of(folder: Path) -> Path:
    """Returns the folder of a run's checkpoints."""
    return folder / "checkpoints"


def name_of(update: int) -> str:
    """Returns the name of the folder after so many finished steps."""
    return f"step_{update:08d}"


def part_of(folder: Path, update: int, lease: Lease | None) -> Path:
    """Returns the folder that a checkpoint is written to; each start of a run has its own."""
    start = f".{lease.start}" if lease else ""
    return checkpoints_of(folder) / f"{name_of(update)}{start}{PART}"


def file_of(rank: int) -> str:
    """Returns the name of the file of a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def receipt_of(rank: int) -> str:
    """Returns the name of the file of a rank's size and checksum."""
    return f"rank_{rank:05d}.json"


def complete(folder: Path) -> list[Stored]:
    """Returns the complete checkpoints of a run with a sound manifest, oldest first."""
    read = ((path, manifest_of(path)) for path in renamed(folder))
    return [Stored(path, manifest) for path, manifest in read if manifest is not None]


def renamed(folder: Path) -> list[Path]:
    """Returns the complete folders, oldest first, whatever became of their files since."""
    return sorted(p for p in checkpoints_of(folder).glob("step_*") if p.suffix not in (PART, OLD))


def manifest_of(path: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's manifest, or None where it is missing or damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not manifest.keys() >= MANIFEST_KEYS:
        return None
    own = manifest.pop("crc32", None)
    sound = own == _crc_of(manifest) and path.name == name_of(manifest["update"])
    return manifest if sound else None


def _crc_of(manifest: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def checksum(path: Path) -> str:
    """Returns the CRC-32 of a file, eight hexadecimal digits: finds flipped bytes at disk speed."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def damage(path: Path, rank: int) -> str | None:
    """Returns what is wrong with a rank's part of a checkpoint, or None."""
    tensors, receipt = path / file_of(rank), path / receipt_of(rank)
    try:
        expected = json.loads(receipt.read_text())
        size, wanted = expected["bytes"], expected["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{receipt.name} is missing or damaged"
    if not tensors.is_file():
        return f"{tensors.name} is missing"
    try:
        if tensors.stat().st_size != size:
            return f"{tensors.name} has {tensors.stat().st_size} bytes, expected {size}"
        if (found := checksum(tensors)) != wanted:
            return f"{tensors.name} has checksum {found}, expected {wanted}"
    except OSError as error:
        return f"{tensors.name} cannot be read: {error.strerror}"
    return None


def verify(stored: Stored) -> list[str]:
    """Checks every rank's part; returns what is wrong."""
    found = (damage(stored.path, rank) for rank in range(stored.manifest["world_size"]))
    return [problem for problem in found if problem]


def set_aside(folder: Path, names: list[str]) -> None:
    """Renames damaged checkpoints: they are kept for a look and no longer counted; rank 0 calls."""
    for name in names:
        path = checkpoints_of(folder) / name
        aside = path.with_name(DAMAGED + name)
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.rename(aside)


def commit(part: Path, manifest: dict[str, Any], lease: Lease | None = None) -> Path:
    """Completes a fully written `.part` folder, in one atomic step; rank 0 calls it.

    A start that has lost the run commits nothing: it asks its lease, and what it asks too early
    fails at the rename, since the new owner's `sweep` has taken the folder away.

    Args:
        part: The folder.
        manifest: What manifest.json will say, but for its own checksum.
        lease: The right to write the run's folder; None where nobody else can be.

    Returns: the folder without `.part`.
    Raises: OSError: if a rank's file is not there, the disk is full, or the run has a new owner.
    """
    for rank in range(manifest["world_size"]):
        for name in (file_of(rank), receipt_of(rank)):
            if not (part / name).is_file():
                raise OSError(f"{part / name} is missing: do all nodes share this folder?")
    if lease:
        manifest = {**manifest, "start": lease.start}
    manifest = {**manifest, "crc32": _crc_of(manifest)}
    with (part / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    flush_folder(part)
    final = part.with_name(name_of(manifest["update"]))
    if lease and not lease.owned():
        raise OSError(f"{lease.folder} has a new owner")
    if final.exists():  # A resumed run arrives at the same step again.
        old = final.with_name(final.name + OLD)
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        part.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(final)
    flush_folder(final.parent)
    return final


def amend(path: Path, entries: dict[str, Any], lease: Lease | None = None) -> None:
    """Changes entries of a complete checkpoint's manifest, whole or not at all; rank 0 calls it.

    Args:
        path: The checkpoint.
        entries: What changes.
        lease: The right to write the run's folder; None where nobody else can be.

    Raises: OSError: if the manifest cannot be read or written, or the run has a new owner.
    """
    if lease and not lease.owned():
        raise OSError(f"{lease.folder} has a new owner")
    manifest = manifest_of(path)
    if manifest is None:
        raise OSError(f"{path / 'manifest.json'} is missing or damaged")
    manifest |= entries
    write_json(path / "manifest.json", {**manifest, "crc32": _crc_of(manifest)})


def prune(
    folder: Path, *, keep_last: int, keep_every: int, lease: Lease | None = None
) -> list[Path]:
    """Removes all but the last `keep_last` and those of every `keep_every`-th step; rank 0 calls.

    Args:
        folder: The run's folder.
        keep_last: Newest checkpoints that stay, at least one.
        keep_every: Steps whose multiples stay as well; 0 keeps none of them.
        lease: As in `commit`; without it nothing is removed any more.

    Returns: the folders that were removed.
    """
    removed = []
    stored = complete(folder)
    for old in stored[: max(0, len(stored) - max(1, keep_last))]:
        if keep_every and old.update % keep_every == 0:
            continue
        if lease and not lease.owned():
            break
        _remove(old.path)
        removed.append(old.path)
    return removed


def _remove(path: Path) -> None:
    """Removes a folder, out of sight first: half removed it must not look complete."""
    aside = path.with_name(f"removed_{path.name.removesuffix(PART)}{PART}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a killed run left half written; before any rank writes."""
    for old in checkpoints_of(folder).glob(f"*{OLD}"):
        # Killed between the two renames of `commit`: the one that was to be replaced counts.
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(old.with_suffix(""))
    for path in checkpoints_of(folder).glob(f"*{PART}"):
        if path.name.startswith("removed_"):
            shutil.rmtree(path, ignore_errors=True)
            continue
        # A start before this one, alive after all, may commit it in this moment, or not at all.
        with suppress(FileNotFoundError):
            _remove(path)


def flush_folder(path: Path) -> None:
    """Flushes a folder: renames and new names inside it outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
