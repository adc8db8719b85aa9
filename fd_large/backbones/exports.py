"""Describes exports of a family's models: names, configuration, features that a library lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Output, Rows, Shape, outputs

PROJECTION = "projection."
# Feature-Distillation's files call the same layer so.
DECODER = "decoder.0."


@dataclass(frozen=True, kw_only=True)
class Export:
    """A family's models in the files of one library.

    Attributes:
        names: Origin of the tensors' names, for the model card.
        rows: Returns the table of its names.
        copies: Returns the names, in our form, under which one of our tensors is written: a shared
            position bias may be copied into every block.
        lacks: Returns the features of a model that the library lacks, given whether images are
            padded, or "".
        added: Returns tensors of the library's model that the model here lacks, by the library's
            names.
        becomes: Returns the architecture of the model in the file, whose blocks may have copies of
            a shared position bias.
        config: Returns config.json for the library's own loader; None for files that only this
            package loads.
        preprocessor: Returns the library's preprocessor_config.json, or None.
        class_name: Returns the name of the library's class of the model.
        lacks_place: Returns the parts of a model for which the library's state dict has no tensor,
            or "".
        window_rule: The rule by which the library's class cuts windows; empty where it has no rule
            of its own.
    """

    names: Callable[[Any], str]
    rows: Callable[[Any], Rows] = lambda architecture: ()
    copies: Callable[[str, Any], list[str]] = lambda name, architecture: [name]
    lacks: Callable[[Any, bool], str] = lambda architecture, pads: ""
    added: Callable[[Any], Mapping[str, Tensor]] = lambda architecture: {}
    becomes: Callable[[Any], Any] = lambda architecture: architecture
    config: Callable[[Any, Statistics], dict[str, Any]] | None = None
    preprocessor: Callable[[Any, Statistics], dict[str, Any]] | None = None
    class_name: Callable[[Any], str] = lambda architecture: ""
    lacks_place: Callable[[Any], str] = lambda architecture: ""
    window_rule: str = ""

    def outputs(self, name: str, shape: Shape, architecture: Any) -> list[Output]:
        """Returns the exported tensors made from one of our tensors, by name and shape."""
        rows = self.rows(architecture)
        return [
            output
            for copy in self.copies(name, architecture)
            for output in outputs(copy, shape, rows)
        ]


Exports = Mapping[str, Export]


def hugging_face_config(architecture: Any, class_name: str) -> dict[str, Any]:
    """Returns the common fields of transformers' configurations."""
    return {
        "architectures": [class_name],
        "model_type": class_name.removesuffix("Model").lower(),
        "dtype": "float32",
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "num_channels": 3,
        "layer_norm_eps": architecture.norm_eps,
    }


def hugging_face_preprocessor(architecture: Any, statistics: Statistics) -> dict[str, Any]:
    """Returns the contents of transformers' preprocessor_config.json for a model."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": architecture.image_size, "width": architecture.image_size},
        "resample": 3,  # Bicubic.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
    }


def timm_config(
    architecture: Any, statistics: Statistics, *, entry: str, pool: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Returns timm's configuration of a model.

    Args:
        architecture: The model, with the image size of the run.
        statistics: Mean and deviation by which images are normalised.
        entry: timm's model with the most similar arguments, all of which are overridden here.
        pool: "token" or "avg".
        arguments: The arguments of timm's model that are particular to the family.
    """
    size = architecture.image_size
    return {
        "architecture": entry,
        "num_classes": 0,
        "num_features": architecture.width,
        "global_pool": pool,
        "model_args": {
            "img_size": size,
            "patch_size": architecture.patch_size,
            "embed_dim": architecture.embed_dim,
            "mlp_ratio": architecture.mlp_ratio,
            "qkv_bias": architecture.qkv_bias != "none",
            **arguments,
        },
        "pretrained_cfg": timm_weights(size, statistics),
    }


def timm_weights(size: int, statistics: Statistics, **others: Any) -> dict[str, Any]:
    """Returns the entries of timm's configuration on weights and the images that they expect."""
    return {
        "num_classes": 0,
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(statistics.mean),
        "std": list(statistics.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **others,
    }
