"""What a checkpoint's manifest says of the teachers, held against those of a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fd_large.errors import CheckpointError
from fd_large.tasks.distillation import target_statistics
from fd_large.tasks.distillation.normalisers import BY_STATISTICS
from fd_large.tasks.distillation.objective import statistics_file
from fd_large.tasks.distillation.section import MAP, SUMMARY, NamedTeacher, field_of, source_flag

# The entries of a manifest for the files of statistics, by kind of target.
_STATISTICS = {MAP: "target_statistics", SUMMARY: "summary_target_statistics"}


def facts_of(entry: NamedTeacher, fingerprint: str, cache: Any | None) -> dict[str, Any]:
    """Returns a teacher's entries of a manifest: its source, and hashes of all that it teaches by.

    Args:
        entry: What the recipe says of it.
        fingerprint: Hash of its weights.
        cache: What reads its maps; None: the teacher itself computes them.
    """
    facts = {"teacher_source": entry.source, "teacher_hash": fingerprint}
    if cache is not None:
        facts |= {"teacher_source": cache.header.teacher["source"]}
        facts |= {"cached_targets": f"{cache.header.digest}, {cache.header.precision}"}
    for kind, key in _STATISTICS.items():
        if path := statistics_file(entry, kind):
            facts[key] = target_statistics.read(path).digest
    return facts


def facts_by_teacher(manifest: Mapping[str, Any], *, several: bool) -> Mapping[str, Any]:
    """Returns what a manifest says of each teacher, by its name; "" is that of an only one.

    Args:
        manifest: The checkpoint's.
        several: Whether the run has several teachers, which the manifest then lists.
    """
    return manifest.get("teachers", {}) if several else {"": manifest}


def require_same_teachers(
    entries: Mapping[str, NamedTeacher],
    stored: Mapping[str, Any],
    ours: Callable[[str], Mapping[str, Any]],
) -> None:
    """Refuses other teachers than a run began with.

    Args:
        entries: What the recipe says of each, by name.
        stored: What the manifest says of each.
        ours: Returns the same of a teacher that is there now.

    Raises: CheckpointError: naming what differs.
    """
    if stored.keys() != entries.keys():
        raise CheckpointError(
            "teachers: not the teachers that this run began with; got "
            f"{', '.join(entries)}, expected {', '.join(stored) or 'one teacher'}. "
            "Give those, or --fresh."
        )
    for name, entry in entries.items():
        _require_same_teacher(name, entry, stored[name], ours(name))


def _require_same_teacher(
    name: str, entry: NamedTeacher, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Refuses another teacher, other cached targets or other statistics than a run began with.

    Args:
        name: The teacher's name; "" for an only one.
        entry: Its entry.
        theirs: What the manifest says of it.
        ours: The same of the teacher that is there now.

    Raises: CheckpointError: naming what differs.
    """
    for kind, key in _STATISTICS.items():
        if entry.setting("normaliser", kind) in BY_STATISTICS and (
            theirs.get(key) != ours.get(key)
        ):
            raise CheckpointError(
                f"{field_of(name, 'target_statistics', kind)}: not the file that this "
                f"run began with; got hash {ours.get(key)}, expected {theirs.get(key)}. "
                "Give that file, or --fresh."
            )
    if theirs.get("cached_targets") != ours.get("cached_targets"):
        raise CheckpointError(
            f"{source_flag(name).removeprefix('--')}: not the cached targets that this run "
            f"began with; got {ours.get('cached_targets')}, expected "
            f"{theirs.get('cached_targets')}. Give those, or --fresh."
        )
    if theirs.get("teacher_hash") != ours["teacher_hash"]:
        raise CheckpointError(
            f"{source_flag(name).removeprefix('--')}: not the teacher that this run began "
            f"with; got hash {ours['teacher_hash']}, expected "
            f"{theirs.get('teacher_hash')} ({theirs.get('teacher_source')}). Give that "
            "file, or --fresh."
        )
