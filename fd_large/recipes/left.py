"""Fields removed from recipes: the version and the remedy of each.

A stored recipe is read without them. A user who sets one, by a flag, in a run file or from Python,
reads the remedy. docs/stability.md shows the table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """A removed field.

    Attributes:
        version: The first version without the field.
        idle: The value at which the field had no effect.
        remedy: A sentence on what to do instead.
    """

    version: str
    idle: Any
    remedy: str


LEFT = {
    "optim.max_seconds": Left(
        "0.9.0", 0, "Name a number of steps with --optim.max_steps, and leave it out."
    ),
    "data.stage_to": Left(
        "0.9.0",
        "",
        "Under Slurm set STAGE_TO in site.sh; elsewhere copy the dataset to each node before the "
        "start, and name the copy in --data.root.",
    ),
}
"""The removed fields, by their name in a recipe."""


def refusal(name: str, value: Any) -> str | None:
    """Returns why a removed field cannot be set, or None for other fields.

    Args:
        name: The field, as it was typed.
        value: Value that the user set.
    """
    left = LEFT.get(name)
    if left is None:
        return None
    return (
        f"{name}: left in version {left.version}; got {value}, expected no such field. "
        f"{left.remedy}"
    )


def without_left(recipe: Any) -> Any:
    """Returns a stored recipe without removed fields; logs once those that had an effect.

    Args:
        recipe: Recipe of a run or a checkpoint; anything but nested dicts stays unchanged.
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
    """Returns the length in steps that a time limit (optim.max_seconds) gave a run, or None.

    Args:
        manifest: Manifest of a checkpoint; decisions after its step do not count.
        first_release: The run's time_box.json, where the first release stored the decision.
    """
    decisions = manifest.get("time_box", {}).get("decisions", [])
    lengths = [entry["updates"] for entry in decisions if entry["step"] <= manifest["update"]]
    had_limit = manifest.get("recipe", {}).get("optim", {}).get("max_seconds")
    if not lengths and had_limit and "updates" in first_release:
        lengths = [int(first_release["updates"])]
    return lengths[-1] if lengths else None


def recorded_length(step: int, decided: int | None) -> dict[str, Any]:
    """Returns the entry of a manifest from which `decided_steps` reads the length again."""
    if decided is None:
        return {}
    return {"time_box": {"decisions": [{"step": step, "updates": decided}]}}
