"""Backbones of timm: the fields of a model, and the models that have a name here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class TimmArchitecture(FamilyArchitecture):
    """A model of timm up to the map at a stride; what timm has is known where timm is imported.

    Attributes:
        timm_name: Name of the model in timm.
        feature_stride: Pixels per token of the map that is taken, each way; 0 takes the last map.
        image_size: Side in pixels of the images that position tables are made for; models without
            such tables take any size.
    """

    timm_name: str
    feature_stride: int = 0
    image_size: int = 0

    family: ClassVar[str] = "timm"
    prefix: ClassVar[str] = "timm:"
    example: ClassVar[str] = "timm"
    whole_first: ClassVar[bool] = True
    resizes_positions: ClassVar[bool] = True

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns a model of timm up to its last map."""
        return cls(timm_name=rest)

    @property
    def own_name(self) -> str:
        """timm:NAME."""
        return f"{self.prefix}{self.timm_name}"

    def at(self, image_size: int) -> Self:
        """Returns the same model for images of that side in pixels."""
        return replace(self, image_size=image_size)

    def _check(self) -> None:
        self._require(bool(self.timm_name), "timm_name", "a name of timm.list_models()")
        self._require(self.feature_stride >= 0, "feature_stride", "a positive whole number, or 0")
        self._require(self.image_size >= 0, "image_size", "a positive whole number, or 0")


MODELS = {
    "efficientnet_lite0": TimmArchitecture(timm_name="tf_efficientnet_lite0", feature_stride=8),
    "timm": TimmArchitecture(timm_name="resnet50", feature_stride=32),
}
