"""Models of the user's own, as teachers: a function returns the module, weights and all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class CustomArchitecture(FamilyArchitecture):
    """A model that a function of the user's own returns.

    Attributes:
        function: package.file:function, which returns the model, weights and all.
    """

    function: str

    family: ClassVar[str] = "module"
    prefix: ClassVar[str] = "module:"
    can_train: ClassVar[bool] = False
    whole_first: ClassVar[bool] = True

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns the model of a function."""
        return cls(function=rest)

    def _check(self) -> None:
        module, colon, function = self.function.partition(":")
        self._require(bool(module and colon and function), "function", "package.file:function")
