"""Fields that earlier versions of the package had and that were removed, with their remedies.

A stored recipe is read without removed fields. A user who sets a removed field, by a flag, in a run
file or from Python, gets an error with its remedy. docs/stability.md shows the table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """Removed field of a recipe.

    Attributes:
        version: The first version without the field.
        idle: Value with which the field had no effect.
        remedy: A sentence on what to do instead.
    """

    version: str
    idle: Any
    remedy: str


LEFT = {
    "optim.max_seconds": Left("0.9.0", 0, "Set a number of steps with --optim.max_steps instead."),
    "data.stage_to": Left(
        "0.9.0",
        "",
        "Under Slurm set STAGE_TO in site.sh; elsewhere copy the dataset to each node before the "
        "start, and name the copy in --data.root.",
    ),
}
"""The removed fields by full name, section.field."""


def refusal(name: str, value: Any) -> str | None:
    """Returns the message for a user who sets a removed field, or None for any other field."""
    left = LEFT.get(name)
    if left is None:
        return None
    return (
        f"{name}: removed in version {left.version}; got {value}, expected no such field. "
        f"{left.remedy}"
    )


def without_left(recipe: Any) -> Any:
    """Returns a stored recipe, as read from JSON, without removed fields.

    Removed fields that had an effect are logged once. A value that is not nested dicts is returned
    unchanged.
    """
    active = []
    for name, left in LEFT.items():
        section, _, key = name.partition(".")
        values = recipe.get(section) if isinstance(recipe, dict) else None
        if isinstance(values, dict) and key in values:
            if values[key] != left.idle:
                active.append(f"{name} {values[key]!r}")
            recipe = {**recipe, section: {k: v for k, v in values.items() if k != key}}
    if active:
        _log(", ".join(active))
    return recipe


@cache  # A start reads the recipe of its run several times.
def _log(fields: str) -> None:
    log.info("the stored recipe is read without removed fields: %s (docs/stability.md)", fields)


def decided_steps(
    manifest: Mapping[str, Any], first_release: Mapping[str, Any] = MappingProxyType({})
) -> int | None:
    """Returns the number of steps to which the removed optim.max_seconds had limited a run.

    The result is None if the run had no time limit, or no limit was decided yet.

    Args:
        manifest: Manifest of a checkpoint. Decisions after the checkpoint's step do not count.
        first_release: Content of the run's time_box.json, in which the first release stored the
            decision.
    """
    decisions = manifest.get("time_box", {}).get("decisions", [])
    lengths = [entry["updates"] for entry in decisions if entry["step"] <= manifest["update"]]
    had_limit = manifest.get("recipe", {}).get("optim", {}).get("max_seconds")
    if not lengths and had_limit and "updates" in first_release:
        lengths = [int(first_release["updates"])]
    return lengths[-1] if lengths else None


def recorded_length(step: int, decided: int | None) -> dict[str, Any]:
    """Returns the entry of the manifest of step `step` that `decided_steps` reads.

    `decided` is the result of `decided_steps`; for None, the entry is empty.
    """
    if decided is None:
        return {}
    return {"time_box": {"decisions": [{"step": step, "updates": decided}]}}
