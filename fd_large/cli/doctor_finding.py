"""What the doctor finds: a line of its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Verdict = Literal["ok", "-", "slow", "low", "missing", "check", "STOPS"]

SEVERITY: dict[Verdict, int] = {
    "ok": 0,
    "-": 0,
    "slow": 1,
    "low": 1,
    "missing": 1,
    "check": 1,
    "STOPS": 2,
}
"""2: training cannot start. "-": nothing to judge."""


class Finding(NamedTuple):
    """A line.

    Attributes:
        what: Was looked at.
        found: In a few words.
        verdict: One of the known words.
        remedy: Of anything that is not "ok".
        alike: What must be the same on every node; "": anything goes.
    """

    what: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    alike: str = ""


def look(what: str, check: Callable[[], Finding]) -> Finding:
    """Runs a check; one that cannot look says why, and the others go on."""
    try:
        return check()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        return Finding(what, f"cannot look: {reason}", "-")
