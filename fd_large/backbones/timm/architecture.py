"""Backbones of timm, as teachers: the fields of a model, and the models that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class TimmArchitecture(FamilyArchitecture):
    """A model of timm up to the map at a stride; what timm has is known where timm is imported.

    Attributes:
        timm_name: Name of the model in timm.
        feature_stride: Pixels per token of the map that is taken, each way.
    """

    timm_name: str
    feature_stride: int

    family: ClassVar[str] = "timm"
    example: ClassVar[str] = "timm"
    can_train: ClassVar[bool] = False
    whole_first: ClassVar[bool] = True

    def _check(self) -> None:
        self._require(self.feature_stride >= 1, "feature_stride", "a positive whole number")


MODELS = {
    "efficientnet_lite0": TimmArchitecture(timm_name="tf_efficientnet_lite0", feature_stride=8),
    # Any other model of timm: --teacher.architecture.timm_name and .feature_stride.
    "timm": TimmArchitecture(timm_name="resnet50", feature_stride=32),
}
