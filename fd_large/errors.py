"""Errors for the user's mistakes: one sentence, exit code 2, no traceback.

Every message has the form `where: what; got X, expected Y. Remedy.` An error of this package
itself keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit codes of a command or a rank; a launcher returns the largest exit code of its ranks."""

    DONE = 0
    LOST = 1  # The process crashed, or another rank was lost.
    MISTAKE = 2
    LOOK = 3  # Somebody has to look before the run is started again.
    AGAIN = 75  # The last checkpoint is complete; the same command goes on from it.
    INTERRUPTED = 130  # The user pressed Ctrl-C twice.


_WORD = re.compile(r'[^\s"]+')
# A password may have a "/" that should have been written as %2F; a port is not a password. A URL
# that was treated as a path has a single slash, and a URL may have lost its scheme.
_USER = re.compile(r"(:/{1,2}|(?<![\w/])//)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d+/)[^\s@]*)@")
_QUERY = re.compile(r"[?#][\w.~%-]+=")
_CLOSING = "'`),.;:]}>"


def without_secrets(text: str) -> str:
    """Returns `text`, in which user, password and query of each URL are replaced by `***`.

    Every source shown to a person, on a page, in a log or by a tracker passes through here.
    The query is also masked after a path without a host, as libraries' messages show it.
    """
    return _WORD.sub(_masked_word, text) if "/" in text or "?" in text else text


def _masked_word(match: re.Match[str]) -> str:
    word = match[0]
    start = word.find("://")
    if "@" in word:
        word = _USER.sub(r"\1***@", word)
    starts = [word.find("?", start)] if start >= 0 else []
    # A fragment may hold a token, too; a fragment that is a place on a page has no "=".
    starts += [place.start() for place in _QUERY.finditer(word)]
    query = min((place for place in starts if place >= 0), default=-1)
    if query < 0 or not (hidden := word[query + 1 :].rstrip(_CLOSING)):
        return word
    return f"{word[: query + 1]}***{word[query + 1 + len(hidden) :]}"


def masked(value: Any) -> Any:
    """Returns a copy of `value` whose texts and keys are printable and without secrets.

    Secrets are the parts of URLs that `without_secrets` replaces.

    Args:
        value: A dict, list, text or number; dicts and lists have such values, too.
    """
    if isinstance(value, str):
        return without_secrets(printable(value))
    if isinstance(value, dict):
        return {masked(key): masked(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(each) for each in value]
    return value


def printable(text: str) -> str:
    """Returns untrusted text with each control character but newline and tab replaced by `?`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class FDError(Exception):
    """A mistake that the user can fix; the command line prints it and exits with `exit_code`.

    Attributes:
        exit_code: The exit code of the command.
        rank_local: Whether a single rank may have met the error; that rank then prints it.
            Otherwise rank 0 prints it.
        agreed: Whether all ranks raise the error together.
        shown: Whether the error was already printed.
    """

    exit_code = Exit.MISTAKE
    rank_local = False
    agreed = False
    shown = False

    def __str__(self) -> str:
        return without_secrets(printable(super().__str__()))

    def _render_traceback_(self) -> list[str]:
        """Returns the lines that IPython prints in a notebook: the message, without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(FDError):
    """A recipe, a flag or a DeepSpeed JSON that cannot be carried out as written."""


class ConflictError(ConfigError):
    """Values of several fields that exclude each other; the remedy names the user's fields.

    Args:
        problem: The message before the remedy, "where: what; got X, expected Y."
        fields: Full names of the fields, section.field.
        remedy: Another remedy, which the message adds after "or"; "" for none.
    """

    def __init__(self, problem: str, fields: tuple[str, ...] = (), remedy: str = "") -> None:
        self.problem, self.fields, self.remedy = problem, fields, remedy
        super().__init__(self._text(fields, ()))

    def told_to(self, user_fields: Collection[str]) -> str:
        """Returns the message for a user who set some of the conflict's fields.

        The remedy names these fields first, and then the fields that the recipe sets.

        Args:
            user_fields: Full names of all fields that the user set, including unrelated fields.
        """
        changeable = [name for name in self.fields if name in user_fields]
        message = ConfigError(
            self._text(changeable, [name for name in self.fields if name not in user_fields])
        )
        return str(message)

    def renamed(self, rename: Callable[[str], str]) -> ConflictError:
        """Returns the conflict with other names of fields, also in the message and the remedy.

        Args:
            rename: Function from a text, in which fields may be named, to the text with new names.
        """
        fields = tuple(map(rename, self.fields))
        return ConflictError(rename(self.problem), fields, self.remedy and rename(self.remedy))

    def _text(self, changeable: Iterable[str], settled: Iterable[str]) -> str:
        """Returns the whole message, with the fields to change.

        Args:
            changeable: Fields that the user set.
            settled: Fields that the recipe set.
        """
        ways = [" or ".join(f"--{name}" for name in changeable)]
        if of_recipe := " or ".join(f"--{name}" for name in settled):
            ways.append(f"{of_recipe}, which the recipe sets")
        if not any(ways):
            return self.problem
        changes = f"Change {', or '.join(filter(None, ways))}"
        return f"{self.problem} {changes}{f', or {self.remedy}' if self.remedy else ''}."


class ShapeError(FDError):
    """Images, patch grids or widths of features whose shapes do not match."""


class DataError(FDError):
    """A data folder or an image that cannot be used."""


class WeightsError(FDError):
    """A weights file that is missing, damaged, or not of the expected model."""


class CheckpointError(FDError):
    """Checkpoints that cannot be read back or written."""


class NotFiniteError(CheckpointError):
    """Checkpoints that hold NaN or infinity, from which no run can resume."""

    exit_code = Exit.LOOK


class CacheError(FDError):
    """Cached targets that are missing, damaged, or of another teacher or other images."""


class StorageError(FDError):
    """A file system that does not answer, which is no mistake of the user's.

    The exit code is that of a stopped run, since the same command resumes the run.
    """

    exit_code = Exit.AGAIN


class LaunchError(FDError):
    """An environment in which the ranks cannot form a process group."""


class VersionError(FDError):
    """A dependency that is installed in an unsupported version."""


class LostRankError(FDError):
    """Another rank has ended, whose own message and exit code give the reason.

    The exit code is 1, not 2, because launchers return the largest exit code of the ranks, and a
    batch job that lost a rank with its node has to start again.
    """

    exit_code = Exit.LOST


def first_line(error: BaseException) -> str:
    """Returns the first line of the text of `error`, without secrets (`without_secrets`).

    If the text is "", the result is the name of the error's class.
    """
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])


def named(error: BaseException) -> str:
    """Returns "CLASS: first line of the text" for an error, or "CLASS" if the text is empty."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Runs every check, and raises a single error with the mistakes of all checks.

    Args:
        checks: Each raises an FDError, or returns a value.

    Returns: the values, in the order of the checks.
    Raises: FDError: of the first mistake's type, with a line for each mistake.
    """
    values: list[Any] = []
    mistakes: list[FDError] = []
    for check in checks:
        try:
            values.append(check())
        except FDError as error:
            mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        lines = dict.fromkeys(line for error in mistakes for line in str(error).splitlines())
        raise type(mistakes[0])("\n".join(lines))
    return values


_NEAREST, _LISTED = 3, 40


def nearest(name: str, names: Iterable[str], *, before: str = "") -> str:
    """Returns "nearest: a, b" for a mistyped name, or "known: ..." if no known name is close.

    If no name is spelled alike, known names that contain the mistyped name count as close, for
    example `optim.base_lr` for `lr`.

    Args:
        name: The mistyped name.
        names: The known names.
        before: Text that is put before each name in the message, such as "--".
    """
    known = sorted(names)
    close = get_close_matches(name, known, n=_NEAREST, cutoff=0.5)
    if not close and len(name) > 1:
        close = [option for option in known if name in option][:_NEAREST]
    options = [f"{before}{option}" for option in close or known]
    return f"nearest: {', '.join(options)}" if close else f"known: {first_names(options, _LISTED)}"


def first_names(names: Sequence[str], most: int = 8) -> str:
    """Returns the first `most` names, with "and N more" if there are further names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
