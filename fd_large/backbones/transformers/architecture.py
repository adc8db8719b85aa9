"""Vision models of transformers, described by a folder's configuration as plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class TransformersArchitecture(FamilyArchitecture):
    """A vision model of transformers, described by the config.json of a folder.

    Attributes:
        transformers_type: Kind of the model in transformers, the `model_type` of its configuration.
        transformers_config: Fields of the model's configuration in transformers, as JSON. A missing
            field has transformers' default.
        image_size: Side in pixels of the images for which position tables are made; models
            without tables take any size.
    """

    transformers_type: str
    transformers_config: str = "{}"
    image_size: int = 0

    family: ClassVar[str] = "transformers"
    prefix: ClassVar[str] = "transformers:"
    example: ClassVar[str] = "transformers:dinov2"
    whole_first: ClassVar[bool] = True

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns the architecture of the `model_type` `rest` with transformers' default values."""
        return cls(transformers_type=rest)

    @property
    def own_name(self) -> str:
        """The model's name in the form `transformers:TYPE`."""
        return f"{self.prefix}{self.transformers_type}"

    def _check(self) -> None:
        self._require(bool(self.transformers_type), "transformers_type", "a model_type")
        self._require(self.image_size >= 0, "image_size", "a positive whole number, or 0")
