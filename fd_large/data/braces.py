"""Names of shards by a pattern with braces, counted before they are written out. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from fd_large.errors import DataError

BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES, _MOST_DIGITS = 1_000_000, 18
_MOST_CHARACTERS = 1 << 28


def expand_braces(pattern: str, *, where: str = "data.root") -> list[str]:
    """Writes out "{00..12}" (leading zeros kept) and "{a,b}"; no nesting.

    Args:
        pattern: A name of shards.
        where: The field that names it, for messages.

    Raises: DataError: if it stands for more than a million names.
    """
    parts = _parts(pattern, where)
    written = ([format(choice, spec) for choice in choices] for choices, spec in parts)
    return ["".join(chosen) for chosen in product(*written)]


def check_braces(pattern: str, *, where: str) -> None:
    """Refuses a pattern that stands for more than a million names; writes none out.

    Raises: DataError: if it does.
    """
    _parts(pattern, where)


def _parts(pattern: str, where: str) -> list[tuple[Sequence[Any], str]]:
    """Choices for each part of a pattern in order, and the format in which they are written."""
    # text, inside, text, inside, ..., text
    parts = [
        _inside(text, where) if index % 2 else ([text], "")
        for index, text in enumerate(BRACES.split(pattern))
    ]
    count = math.prod(len(choices) for choices, _ in parts)
    if count > _MOST_NAMES or count * len(pattern) > _MOST_CHARACTERS:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        got = f"{count:,}" if count < 10**15 else "more than 10^15"
        raise DataError(
            f"{where}: {shown}: braces that stand for too many names; got {got}, expected at most "
            f"{_MOST_NAMES:,}. Correct the numbers, or name a folder."
        )
    return parts


def _inside(text: str, where: str) -> tuple[Sequence[Any], str]:
    if match := _RANGE.fullmatch(text):
        ends = [digits.lstrip("0") or "0" for digits in match.groups()]
        if max(map(len, ends)) > _MOST_DIGITS:
            raise DataError(
                f"{where}: {{{text[:40]}}}: numbers too long for names of shards; got more than "
                f"{_MOST_DIGITS} digits, expected fewer. Correct them."
            )
        first, last = map(int, ends)
        step = 1 if first <= last else -1
        return range(first, last + step, step), f"0{len(match[1])}d"
    return text.split(",") if "," in text else [f"{{{text}}}"], ""
