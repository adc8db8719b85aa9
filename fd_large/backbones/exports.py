"""The description of a family's exports: tensor names, configuration, and what libraries lack."""

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
    """How models of one family are exported to one library.

    All attributes but `window_rule` are functions of our architecture. `copies` also takes, as its
    first argument, our name of the tensor. Second arguments are, for `lacks`, whether images are
    padded, and for `config` and `preprocessor`, the statistics by which images are normalised.

    Attributes:
        names: Returns the origin of the tensor names, in words, for the model card.
        rows: Returns the table that translates the library's tensor names.
        copies: Returns the names, before translation, under which one of our tensors is written.
            There are several if a shared position bias is copied into every block.
        lacks: Returns, in words, the features of the model that the library lacks, or "".
        added: Returns {the library's name: tensor} of the tensors that the library's model has and
            ours lacks.
        becomes: Returns the architecture of the exported model, which differs from ours if blocks
            get copies of a shared position bias.
        config: Returns the contents of config.json for the library's loader. None if only this
            package loads the files.
        preprocessor: Returns the contents of the library's preprocessor_config.json. None if the
            library has no such file.
        class_name: Returns the name of the library's class of the model.
        lacks_place: Returns, in words, the parts of the model for which the library's state dict
            has no tensor, or "".
        window_rule: Rule by which the library's class cuts maps into windows
            (`backbones.windows`); empty if the class has no such rule.
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
        """Returns the exported tensors that are made from one of our tensors.

        Args:
            name: Our name of the tensor.
            shape: Its shape.
            architecture: Our model.
        """
        rows = self.rows(architecture)
        return [
            output
            for copy in self.copies(name, architecture)
            for output in outputs(copy, shape, rows)
        ]


Exports = Mapping[str, Export]


def hugging_face_config(architecture: Any, class_name: str) -> dict[str, Any]:
    """Returns the fields of transformers' config.json that all families write.

    Args:
        architecture: The model.
        class_name: transformers' class of the model.
    """
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
    """Returns the contents of transformers' preprocessor_config.json for a model.

    Args:
        architecture: The model, with the image size of the run.
        statistics: Mean and standard deviation by which images are normalised.
    """
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
    """Returns the contents of timm's config.json for a model.

    Args:
        architecture: The model, with the image size of the run.
        statistics: Mean and standard deviation by which images are normalised.
        entry: Name of timm's most similar model; the configuration overrides all arguments of this
            model of timm.
        pool: timm's `global_pool`, "token" or "avg".
        arguments: The arguments of timm's model that only this family has.
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
    """Returns timm's `pretrained_cfg`: the images that the weights expect, and layer names.

    Args:
        size: Side of the images, in pixels.
        statistics: Mean and standard deviation by which images are normalised.
        others: Entries that are added or replaced.
    """
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
