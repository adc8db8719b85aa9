"""The libraries that `export` writes for, by the name that `--to` takes; no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

To = Literal["timm", "hf", "fd"]


class Library(NamedTuple):
    """A library.

    Attributes:
        package: The package that loads its files.
        holds: What its files hold, for messages.
    """

    package: str
    holds: str


LIBRARIES: dict[To, Library] = {
    "timm": Library("timm", "a model of timm"),
    "hf": Library("transformers", "a model of transformers"),
    "fd": Library("fd_large", "the names of the Feature-Distillation repository"),
}
