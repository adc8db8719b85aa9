"""How a family's models leave for other libraries: names, configuration, what they lack there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Shape, replaced

PROJECTION = "projection."
# Feature-Distillation's files call the same layer so.
DECODER = "decoder.0."


class Output(NamedTuple):
    """A tensor of an exported file.

    Attributes:
        name: Name in the file.
        shape: Shape in the file.
        take: Makes it from our tensor.
    """

    name: str
    shape: Shape
    take: Callable[[Tensor], Tensor]


def same(name: str, shape: Shape) -> list[Output]:
    """Returns our tensor as it is, under a name."""
    return [Output(name, shape, lambda tensor: tensor)]


@dataclass(frozen=True, kw_only=True)
class Export:
    """A family's models in the files of one library.

    Attributes:
        names: Says whose names the tensors get, for the model card.
        outputs: Returns what becomes of one of our tensors, by name and shape.
        lacks: Says what of a model the library has not, given whether images are padded; empty if
            it has all.
        added: Returns tensors of the library's model that ours does without, by their names there.
        becomes: Returns the model that is in the file: a shared position bias may be copied.
        config: Returns what its own loader reads in config.json; None for files that only we load.
        preprocessor: Returns its preprocessor_config.json; None if there is none.
        class_name: Returns its class of the model.
        rename: Returns the name of a tensor in its state dict, where one of ours is one of theirs.
        lacks_place: Says for what of a model its state dict has no place; empty if for nothing.
        window_rule: The rule of windows of its class; empty where it has none of its own.
    """

    names: Callable[[Any], str]
    outputs: Callable[[str, Shape, Any], list[Output]]
    lacks: Callable[[Any, bool], str] = lambda architecture, pads: ""
    added: Callable[[Any], Mapping[str, Tensor]] = lambda architecture: {}
    becomes: Callable[[Any], Any] = lambda architecture: architecture
    config: Callable[[Any, Statistics], dict[str, Any]] | None = None
    preprocessor: Callable[[Any, Statistics], dict[str, Any]] | None = None
    class_name: Callable[[Any], str] = lambda architecture: ""
    rename: Callable[[str, Any], str] = lambda name, architecture: name
    lacks_place: Callable[[Any], str] = lambda architecture: ""
    window_rule: str = ""


Exports = Mapping[str, Export]


def feature_distillation(name: str, shape: Shape, pairs: tuple = ()) -> list[Output]:
    """Returns the tensor of a student in Feature-Distillation's names, projection included."""
    if not name.startswith(PROJECTION):
        return same(f"encoder.{replaced(name, pairs)}", shape)
    name = f"{DECODER}{name.removeprefix(PROJECTION)}"
    if len(shape) == 2:  # There it is a convolution of side 1.
        return [Output(name, (*shape, 1), lambda tensor: tensor.unsqueeze(-1))]
    return same(name, shape)


def hugging_face(name: str, shape: Shape, pairs: tuple[tuple[str, str], ...]) -> list[Output]:
    """Returns a tensor in the names of transformers; a fused one becomes query, key and value.

    Args:
        name: Name in our model.
        shape: Shape in our model.
        pairs: The family's own replacements, after those of all.
    """
    if name.startswith("norm."):
        return same(f"layernorm.{name.removeprefix('norm.')}", shape)
    name = replaced(name, (*_HUGGING_FACE, *pairs))
    start, fused, kind = name.rpartition(".qkv.")
    if not fused:
        return same(name, shape)
    rows, third = shape[0] // 3, (shape[0] // 3, *shape[1:])

    def part(which: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[which * rows : (which + 1) * rows]

    return [
        Output(f"{start}.{letter}.{kind}", third, part(i))
        for i, letter in enumerate(("query", "key", "value"))
    ]


_HUGGING_FACE = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.q_bias", ".attn.query.bias"),
    (".attn.v_bias", ".attn.value.bias"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def hugging_face_config(architecture: Any, class_name: str) -> dict[str, Any]:
    """Returns what all configurations of transformers have in common."""
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
    """Returns how transformers prepares images for a model."""
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
        entry: Its model whose arguments are the nearest; the arguments here override all of them.
        pool: "token" or "avg".
        arguments: The family's own.
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
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
