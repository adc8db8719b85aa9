"""A vision model of transformers as a frozen teacher that returns its last hidden state.

The map is transformers' `last_hidden_state`. It follows the final norm if the model has one; for
ConvNeXt and Hiera, whose norm follows the mean of the map, it is raw. Class and register tokens are
prefix tokens. Positions are resized to the images by transformers' own rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fd_large.backbones.family import Options
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.token_positions import TokenPositions, image_positions
from fd_large.backbones.transformers.architecture import TransformersArchitecture
from fd_large.backbones.transformers.kinds import kind_of, library
from fd_large.errors import ConfigError, ShapeError, WeightsError, first_line
from fd_large.files import parse_json

# DINOv3's ConvNeXt does not state it.
_CONVNEXT_PATCH = 4
_WHERE = "teacher.architecture.transformers_config"


class TransformersBackbone(nn.Module):
    """A vision model of transformers up to its last hidden state.

    Names of parameters are transformers' own after the prefix `net.`.

    Args:
        model_type: The `model_type` of the model's configuration.
        config: The fields of the model's configuration, as JSON.

    Attributes:
        width: Channels of the map.
        stride: Pixels per token.
        num_prefix_tokens: Class and register tokens of the map.
        drop_path_rates: Empty, since a teacher has no drop path.

    Raises: WeightsError: if transformers cannot build a model of that configuration.
    """

    drop_path_rates: tuple[float, ...] = ()

    def __init__(self, model_type: str, config: str) -> None:
        super().__init__()
        self.name = f"transformers:{model_type}"
        kind, package = kind_of(model_type, _WHERE), library(_WHERE)
        try:
            settings = getattr(package, kind.config)(**parse_json(config) | dict(kind.without))
            net = getattr(package, kind.model)(settings, **kind.arguments)
            self.width, self.stride = _width(settings), _stride(settings)
        except Exception as error:  # transformers' checks raise errors of many kinds.
            raise WeightsError(
                f"{_WHERE}: transformers {package.__version__} cannot build this model; got "
                f"{type(error).__name__} {first_line(error)[:200]} for {self.name}, expected the "
                "configuration of a published one. Fetch the folder's config.json again."
            ) from error
        self.num_prefix_tokens = kind.class_tokens + getattr(settings, "num_register_tokens", 0)
        self._takes_patches = hasattr(settings, "num_patches")
        self._arguments = {"interpolate_pos_encoding": True} if kind.asks_to_resize else {}
        # The norm after the map's mean, and what stands in for hidden patches, have no effect.
        if kind.norm_of_mean:
            setattr(net, kind.norm_of_mean, nn.Identity())
        embeddings = getattr(net, "embeddings", None)
        if getattr(embeddings, "mask_token", None) is not None:
            embeddings.mask_token = None
        # Registers of a model without any: ZeRO-3 cannot split a tensor without elements.
        for module in net.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.numel():
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach(), persistent=False)
        self.net = net

    def cast_buffers(self, dtype: torch.dtype) -> None:
        """Casts the buffers that have no elements to `dtype`; other buffers stay float32.

        A buffer without elements replaces a parameter without elements, such as the registers of a
        model that has none, which transformers joins with tensors in the dtype of the weights. The
        other buffers are, for example, positions.
        """
        for module in self.net.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.numel():
                    setattr(module, name, buffer.to(dtype))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        Raises: ShapeError: if a side is not a multiple of the stride.
        """
        if height % self.stride or width % self.stride:
            raise ShapeError(
                f"{self.name}: the image does not divide into tokens; got {height}x{width} pixels, "
                f"expected multiples of the stride {self.stride}. Set "
                "--objective.teacher_image_size."
            )
        return height // self.stride, width // self.stride

    def forward(self, images: Tensor, keep: Tensor | None = None) -> FeatureMap:
        """Maps normalised images to tokens.

        Args:
            images: (B, 3, H, W), any float dtype.
            keep: Not used.

        Returns: tokens (B, N, C) in the dtype of the weights, prefix tokens first.
        Raises: ShapeError: if the image size does not fit.
        """
        grid = self.grid(*images.shape[-2:])
        if self._takes_patches:
            patches = rearrange(
                images, "b c (h i) (w j) -> b (h w) (i j c)", i=self.stride, j=self.stride
            )
            # On the host: the model looks at these numbers. One row serves all images.
            tokens = self.net(patches, None, torch.tensor([grid])).last_hidden_state
        else:
            tokens = self.net(images, **self._arguments).last_hidden_state
        if tokens.ndim == 4:
            tokens = rearrange(tokens, "b c h w -> b (h w) c")
        assert tokens.shape[1] == self.num_prefix_tokens + grid[0] * grid[1], tokens.shape
        return FeatureMap(tokens, grid, self.num_prefix_tokens)

    def token_positions(self, grid: tuple[int, int]) -> Callable[[str, int], TokenPositions | None]:
        """Returns a function that finds the positions of an attention module's tokens.

        Diagnosis uses this function to place attention maps in the image.

        Args:
            grid: Rows and columns of the map.

        Returns: a function (name of the module, its number of tokens) -> positions of the tokens,
            or None if the positions are not known.
        """
        map_tokens = self.num_prefix_tokens + grid[0] * grid[1]
        known = image_positions(grid, self.num_prefix_tokens)
        return lambda name, num_tokens: known if num_tokens == map_tokens else None

    def blocks(self) -> list[nn.Module]:
        """Returns an empty list, since activations of a teacher are never recomputed."""
        return []

    def no_weight_decay(self) -> frozenset[str]:
        """Returns an empty set, since a teacher is not trained."""
        return frozenset()

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Returns an empty tuple, since a teacher is not trained."""
        return ()


def _width(settings: Any) -> int:
    if hasattr(settings, "hidden_sizes"):
        return settings.hidden_sizes[-1]
    if hasattr(settings, "embed_dim_multiplier"):
        return int(settings.embed_dim * settings.embed_dim_multiplier ** (len(settings.depths) - 1))
    return settings.hidden_size


def _stride(settings: Any) -> int:
    """Returns the pixels per token, each way, of a model's last map.

    Args:
        settings: transformers' configuration of the model.

    Raises:
        ValueError: For patches that are not square, images without 3 channels, or a Hiera that does
            not halve its map after every stage.
    """
    if settings.num_channels != 3:
        raise ValueError(f"num_channels {settings.num_channels}")
    halvings = 0
    if hasattr(settings, "hidden_sizes"):
        halvings = len(settings.hidden_sizes) - 1
    sides = getattr(settings, "patch_size", _CONVNEXT_PATCH)
    if hasattr(settings, "patch_stride"):
        sides, halvings = settings.patch_stride, settings.num_query_pool
        if halvings != len(settings.depths) - 1 or set(settings.query_stride) != {2}:
            # The tokens would be left in the order of its windows.
            raise ValueError(f"num_query_pool {halvings} of {len(settings.depths)} stages")
    sides = {sides} if isinstance(sides, int) else set(sides)
    if len(sides) != 1 or not min(sides) > 0:
        raise ValueError(f"patches of {sides}")
    return sides.pop() * 2**halvings


def build(architecture: TransformersArchitecture, options: Options) -> TransformersBackbone:
    """Builds a model with random weights, as transformers initialises them.

    Raises: ConfigError: if the model is a student.
    """
    if options.is_trained:
        raise ConfigError(
            "student.model: models of transformers can only be teachers; got "
            f"{architecture.own_name}, expected a model of this project or of timm. Set "
            "--student.model timm:NAME."
        )
    return TransformersBackbone(architecture.transformers_type, architecture.transformers_config)
