"""What a checkpoint's manifest says of a teacher, held against the teacher of a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fd_large.errors import CheckpointError
from fd_large.tasks.distillation.normalisers import BY_STATISTICS
from fd_large.tasks.distillation.section import MAP, SUMMARY, NamedTeacher, field_of
from fd_large.tasks.distillation.teacher_grids import source_flag

STATISTICS = {MAP: "target_statistics", SUMMARY: "summary_target_statistics"}
"""The entries of a manifest for the files of statistics, by kind of target."""


def require_same_teacher(
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
    for kind, key in STATISTICS.items():
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
