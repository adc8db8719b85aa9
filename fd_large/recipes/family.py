"""Describes a model of a backbone family before the model is built. Imports no torch.

Each family declares its fields once, in a dataclass of `backbones/NAME/architecture.py` that
derives from `FamilyArchitecture`. The rest of the package asks the class attributes and methods
declared here about a family, and never compares the family's name.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

from fd_large.errors import ConflictError
from fd_large.recipes.fields import check_types

Kind = Literal["convolutions", "attention", "windows"]
"""Operation that mixes a model's tokens: convolutions, global attention, or window attention."""

MOST_BLOCKS = 1000
"""Largest number of blocks that is accepted, which no real model exceeds."""
_MOST_STAGES = 8
# Bounds above every value of a published configuration: its number of blocks, and its values.
_MOST_MADE = 200
_LARGEST, _LONGEST, _MOST_VALUES = 2**17, 64, 32


def is_plain(value: Any, *, counts_blocks: bool = False) -> bool:
    """Whether a value from a foreign configuration is acceptable for a model's field.

    Acceptable are None, a bool, a bounded number, a short text, and a short list of these. If the
    field `counts_blocks`, only whole numbers from 0 are, or a list of them, with a bounded sum.
    """
    several = value if isinstance(value, list) else [value]
    if counts_blocks:
        whole = all(isinstance(count, int) and count >= 0 for count in several)
        return whole and sum(several) <= _MOST_MADE
    return len(several) <= _MOST_VALUES and all(map(_is_plain, several))


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return value is None


@dataclass(frozen=True, kw_only=True)
class FamilyArchitecture:
    """Model of a backbone family: a value for every field that models of the family have.

    The values are checked when an object is made. A subclass is a frozen dataclass whose docstring
    describes the fields under "Attributes:". A field that several families have must have the same
    type and description in all.
    """

    family: ClassVar[str]
    """The family's name in recipes and files."""
    example: ClassVar[str]
    """A named model of the family, for places where a recipe has to name a model."""
    prefix: ClassVar[str] = ""
    """Prefix of names for any model of the family, as `timm:`; "" if there are no such names."""
    whole_first: ClassVar[bool] = False
    """Whether every rank builds the complete module, which is partitioned afterwards.

    Constructors that write to the parameters of their children need this.
    """
    resizes_positions: ClassVar[bool] = False
    """Whether position tables are made for the size of the images, and resized when weights load.

    Otherwise the tables have the size of `image_size`.
    """
    is_hierarchical: ClassVar[bool] = False
    """Whether the model has several stages, each at half the resolution of the one before."""
    can_pad: ClassVar[bool] = False
    """Whether images whose size does not fit the patches can be padded (`student.size_rule`)."""
    has_stage_windows: ClassVar[bool] = False
    """Whether each stage may have windows of its own size (`student.stage_windows`)."""
    mean_norm: ClassVar[Literal["none", "instead", "also"]] = "also"
    """How fine-tuning normalises the mean of the tokens.

    "none": by the model's final norm only. "instead": by a new norm, which replaces the final norm.
    "also": by a new norm after the model, which keeps its final norm if it has one.
    """
    has_batch_norms: ClassVar[bool] = False
    """Whether models of the family may have batch norms (`student.norm_batch`)."""
    has_sequential_stages: ClassVar[bool] = False
    """Whether the first stages can save memory by computing attention for few windows at a time."""

    def __post_init__(self) -> None:
        check_types(self, "architecture")
        self._check()

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns the model whose name is the family's prefix followed by `rest`."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raises ConfigError if a field has an invalid value; subclasses check their own fields."""

    def _require(self, ok: bool, field: str, expected: str, *beside: str) -> None:
        """Raises ConflictError unless `ok`, for a value of `field` that is not as `expected`.

        The names in `beside` are of other fields that decide whether the value is valid.
        """
        if not ok:
            raise ConflictError(
                f"architecture.{field}: invalid for a {self.family} model; got "
                f"{getattr(self, field)!r}, expected {expected}.",
                tuple(f"architecture.{name}" for name in (field, *beside)),
            )

    @property
    def kind(self) -> Kind:
        """The operation that mixes the model's tokens.

        It is "convolutions", "attention" over all tokens, or attention in "windows".
        """
        return "attention"

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens without a position in the image, such as a class token."""
        return 0

    @property
    def fixed_image_size(self) -> int:
        """Side in pixels if the model takes images of one size only; 0 for any size that fits."""
        return 0

    @property
    def code(self) -> str:
        """Name of the user's own code that makes the model; "" for the package's models."""
        return ""

    @property
    def own_name(self) -> str:
        """The model's name with the family's prefix, or "" if the family has no prefix."""
        return ""

    def at(self, image_size: int) -> Self:
        """Returns the same model for images of `image_size` pixels a side.

        The model is returned unchanged if it takes any size, or if its tensors always have the size
        that follows from its own `image_size`.
        """
        return self

    def overridden(self, values: dict[str, Any]) -> Self:
        """Returns the model with the values of some fields replaced by `values`, {field: value}.

        Raises: ConfigError: if the values do not fit the other fields.
        """
        return replace(self, **values)

    def with_own_position_biases(self) -> Self:
        """Returns the model with a position bias in each block instead of a shared bias.

        A family without shared biases returns the model unchanged.
        """
        return self

    def summary(self) -> dict[str, Any]:
        """Returns the shape for the model card, {label: value}, such as {"patch": 16}."""
        return {}

    def values(self) -> dict[str, Any]:
        """Returns {field: value} of all fields, with the family's name as `family`."""
        return {"family": self.family, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Transformer(FamilyArchitecture):
    """Fields that vision transformers share.

    Attributes:
        embed_dim: Number of channels after the patch embedding; in a Swin model, each further stage
            has twice as many channels as the stage before.
        depths: Number of blocks in each stage; a ViT has one stage.
        num_heads: Number of attention heads in each stage.
        patch_size: Side of a patch in pixels.
        image_size: Side in pixels of the images for which position tables are made; models
            without tables take any size.
        mlp_ratio: Number of hidden channels of an MLP, as a multiple of the block's channels.
        qkv_bias: Biases of the attention. "none": no bias. "qv": a vector for the query and a
            vector for the value. "qkv": a vector for each of query, key and value. "fused": one
            vector for all three.
        absolute_position: Whether a learned position embedding is added to the tokens.
        norm_eps: Constant that a LayerNorm adds to the variance.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    patch_size: int
    image_size: int
    mlp_ratio: float
    qkv_bias: Literal["none", "qv", "qkv", "fused"]
    absolute_position: bool
    norm_eps: float

    @property
    def width(self) -> int:
        """Number of channels of the feature map."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    def summary(self) -> dict[str, Any]:
        """Returns the shape for the model card, {label: value}.

        "width, depths, heads" is a text, and "patch" the side of a patch in pixels.
        """
        depths, heads = (" ".join(map(str, numbers)) for numbers in (self.depths, self.num_heads))
        return {
            "width, depths, heads": f"{self.embed_dim}, {depths}, {heads}",
            "patch": self.patch_size,
        }

    def _check(self) -> None:
        stages = len(self.depths)
        self._require(
            1 <= stages <= _MOST_STAGES
            and min(self.depths) >= 1
            and sum(self.depths) <= MOST_BLOCKS,
            "depths",
            f"1 to {_MOST_STAGES} stages of one or more blocks, at most {MOST_BLOCKS} in all",
        )
        self._require(len(self.num_heads) == stages, "num_heads", f"{stages} numbers", "depths")
        for field in ("embed_dim", "patch_size", "image_size"):
            self._require(getattr(self, field) >= 1, field, "a positive whole number")
        self._require(self.mlp_ratio > 0, "mlp_ratio", "a positive number")
        self._require(self.norm_eps > 0, "norm_eps", "a positive number")
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            self._require(
                heads >= 1 and width % heads == 0,
                "num_heads",
                f"divisors of width {width}",
                "embed_dim",
            )


@dataclass(frozen=True, kw_only=True)
class WindowedTransformer(Transformer):
    """Fields that the Swin models share.

    Attributes:
        window_size: Side of an attention window in tokens. A smaller map is a single window, except
            under window_rule official, which pads it.
        patch_norm: Whether a LayerNorm follows the patch embedding.
    """

    window_size: int
    patch_norm: bool

    is_hierarchical: ClassVar[bool] = True
    mean_norm: ClassVar[Literal["none", "instead", "also"]] = "none"
    can_pad: ClassVar[bool] = True

    @property
    def kind(self) -> Kind:
        """The operation that mixes the model's tokens: "windows", for attention in windows."""
        return "windows"

    @property
    def fixed_image_size(self) -> int:
        """Side in pixels if the model takes images of one size only; 0 for any size that fits."""
        return self.image_size if self.absolute_position else 0

    def summary(self) -> dict[str, Any]:
        """Returns the entries of every transformer and "window", the side of a window in tokens."""
        return {**super().summary(), "window": self.window_size}

    def with_window(self, window_size: int) -> Self:
        """Returns the same model with windows of `window_size` tokens on a side.

        Weights of this model can be loaded into the result.
        """
        return replace(self, window_size=window_size)

    def _check(self) -> None:
        super()._check()
        self._require(self.window_size >= 1, "window_size", "a positive whole number")
