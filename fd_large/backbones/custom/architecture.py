"""The architecture of a model that the user's own class or function makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from fd_large import doors
from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class CustomArchitecture(FamilyArchitecture):
    """A model made by the user's own class or function.

    Attributes:
        function: Class or function that makes the model, path/to/file.py:NAME or
            package.module:NAME, or the name of an installed package's entry point.
        image_size: Side in pixels of the images for which position tables are made; models
            without tables take any size.
    """

    function: str
    image_size: int = 0

    family: ClassVar[str] = "module"
    prefix: ClassVar[str] = doors.PREFIX
    whole_first: ClassVar[bool] = True
    has_batch_norms: ClassVar[bool] = True

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns the architecture of the model that a class or function makes.

        Args:
            rest: The class or function: path/to/file.py:NAME, package.module:NAME, or the name of
                an installed package's entry point.
        """
        return cls(function=rest)

    @property
    def code(self) -> str:
        """The class or function by the name that `doors.load` takes.

        For example, it is module:path/to/file.py:NAME, or the name of an entry point.
        """
        return f"{doors.PREFIX}{self.function}" if ":" in self.function else self.function

    @property
    def own_name(self) -> str:
        """The model's name: `module:` and the class or function, or the name of an entry point."""
        return self.code

    def at(self, image_size: int) -> Self:
        """Returns the same model for images of `image_size` pixels a side."""
        return replace(self, image_size=image_size)

    def _check(self) -> None:
        place, colon, name = self.function.rpartition(":")
        known = bool(place and name) if colon else self.function in doors.installed("backbones")
        self._require(known, "function", "path/to/file.py:NAME or package.module:NAME")
        self._require(self.image_size >= 0, "image_size", "a positive whole number, or 0")
