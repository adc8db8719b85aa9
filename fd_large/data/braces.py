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
    return ["".join(chosen) for chosen in product(*_choices(pattern, where))]


def check_braces(pattern: str, *, where: str) -> None:
    """Refuses a pattern that stands for more than a million names; writes none out.

    Raises: DataError: if it does.
    """
    _choices(pattern, where)


def _choices(pattern: str, where: str) -> list[Sequence[str]]:
    """Texts to choose from, for each part of a pattern in order; ranges are lazy."""
    parts = BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices: list[Sequence[str]] = []
    for index, part in enumerate(parts):
        choices.append([part] if index % 2 == 0 else _inside(part, where))
    count = math.prod(map(len, choices))
    if count > _MOST_NAMES or count * len(pattern) > _MOST_CHARACTERS:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        raise DataError(
            f"{where}: {shown}: braces that stand for too many names; got {_amount(count)}, "
            f"expected at most {_MOST_NAMES:,}. Correct the numbers, or name a folder."
        )
    return choices


def _inside(text: str, where: str) -> Sequence[str]:
    if match := _RANGE.fullmatch(text):
        ends = [digits.lstrip("0") or "0" for digits in match.groups()]
        if max(map(len, ends)) > _MOST_DIGITS:
            raise DataError(
                f"{where}: {{{text[:40]}}}: numbers too long for names of shards; got more than "
                f"{_MOST_DIGITS} digits, expected fewer. Correct them."
            )
        return _Numbers(int(ends[0]), int(ends[1]), len(match.group(1)))
    return text.split(",") if "," in text else [f"{{{text}}}"]


def _amount(count: int) -> str:
    return f"{count:,}" if count < 10**15 else "more than 10^15"


class _Numbers(Sequence[str]):
    """Numbers of a range as text, made when asked for; of at least `digits` digits each."""

    def __init__(self, first: int, last: int, digits: int) -> None:
        step = 1 if first <= last else -1
        self._numbers, self._digits = range(first, last + step, step), digits

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return str(self._numbers[index]).zfill(self._digits)
