"""Published weights of SwinV2, and the windows by which a file's coordinates are scaled."""

from __future__ import annotations

import math
import re
from typing import Any

from fd_large.backbones import hierarchical_published as names
from fd_large.backbones.published import (
    Format,
    Published,
    Settling,
    TargetModel,
    TensorFile,
    WeightFacts,
)
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.swinv2.architecture import trained_windows
from fd_large.backbones.translation import (
    FEATURE_DISTILLATION,
    Pieces,
    Shapes,
    expanded,
    table,
)
from fd_large.recipes.architectures import Architecture

_OF_FD = """
layers.#.rel_pos_bias.{rpe|cpb}_mlp.*       layers.#.position_bias.cpb_mlp.*
layers.#.blocks.#.attn.{rpe|cpb}_mlp.*      layers.#.blocks.#.attn.cpb_mlp.*
layers.#.blocks.#.enorm.*                   layers.#.blocks.#.extra_norm.*
"""
# Feature-Distillation's student, with its projection and beside its teacher.
STUDENT = (
    *table("feature_model.* -"),
    *table(_OF_FD + names.OF_OFFICIAL, start="{encoder.|}"),
    *FEATURE_DISTILLATION,
)
# In the Swin-Transformer repository, with Feature-Distillation's position bias.
_SIMMIM = table(_OF_FD + names.OF_SIMMIM, start="{|encoder.}")

FORMATS = {
    "simmim_swinv2": names.imagenet_format(
        "SimMIM's SwinV2",
        ("mask_token", r"\.cpb_mlp\.|\.rpe_mlp\."),
        _SIMMIM,
        models="swinv2_1b",
    ),
    "hf_swinv2": Format(
        "Hugging Face Swin V2",
        (r"attention\.self\.continuous_position_bias_mlp\.",),
        names.HF_SWINV2,
        ask=("norm_eps",),
        library="hf",
    ),
    "timm_swinv2_cr": Format(
        "timm's other SwinV2 (swinv2_cr_*)",
        (r"^stages\.", r"\.meta_mlp\."),
        (),
        refusal="it is another model: another position bias, another order in merging, no final "
        "norm. Use --teacher.source timm:swinv2_cr_...",
    ),
    "fd_swinv2": names.imagenet_format(
        "Feature-Distillation SwinV2 student",
        (r"\.rpe_mlp\.",),
        STUDENT,
    ),
    "timm_swinv2": names.imagenet_format(
        "timm's SwinV2",
        (r"\.cpb_mlp\.", r"layers\.1\.downsample\."),
        names.TIMM,
        without=r"layers\.0\.downsample\.",
    ),
    "swinv2": names.imagenet_format(
        "Swin-Transformer's SwinV2",
        (r"\.cpb_mlp\.",),
        names.OFFICIAL,
        models="swinv2_",
    ),
}


def recognise(shapes: Shapes, file: TensorFile) -> Architecture:
    """Returns the architecture fields that a file's tensors show.

    No tensor shows `norm_eps`. Tensors show the fields of windows only if the file has tables of
    coordinates.

    Args:
        shapes: Shapes of the file's tensors, by our names.
        file: The file, from which the tables of coordinates are read.
    """
    fields = names.recognised(shapes)
    stages = len(fields["depths"])
    scales = [shapes.get(f"layers.{s}.blocks.0.attn.logit_scale", (0,)) for s in range(stages)]
    heads = tuple(shape[0] for shape in scales)
    windows, pretrained, side = _windows(stages, file)
    normed = [re.match(r"layers\.\d+\.blocks\.(\d+)\.extra_norm\.weight", name) for name in shapes]
    return Architecture(
        family="swinv2",
        num_heads=heads if all(heads) else None,
        pretrained_window_sizes=pretrained or None,
        extra_norm_every=min((int(match[1]) + 1 for match in normed if match), default=0),
        shared_position_bias=any(".position_bias.cpb_mlp." in name for name in shapes),
        **fields,
        **names.window_and_size(fields, windows, side, shapes),
    )


def _windows(stages: int, file: TensorFile) -> tuple[list[int], tuple[int, ...], int]:
    """Returns what the tables of coordinates and attention masks in official files show.

    Args:
        stages: Number of stages of the model.
        file: The file, from which the tables are read.

    Returns: for each stage the side of a window in tokens, 0 if no table shows this side; for each
        stage the side of a window in pre-training, or () if a stage has no table; and the number of
        patches along a side of the image, 0 if no mask shows this number.
    """
    windows, pretrained, side = [0] * stages, [0] * stages, 0
    for name in file:
        stage = re.match(r"(?:encoder\.)?layers\.(\d+)\.", name)
        if stage is None or int(stage[1]) >= stages:
            continue
        s = int(stage[1])
        if name.endswith(".relative_coords_table") and not windows[s]:
            windows[s] = (file.shape(name)[-2] + 1) // 2
            pretrained[s] = _reference(file[name].max().item(), windows[s])
        elif name.endswith(".attn_mask") and not side:
            count, tokens, _ = file.shape(name)
            side = math.isqrt(count * tokens) * 2**s
    return windows, tuple(pretrained) if all(windows) else (), side


def _reference(largest: float, window: int) -> int:
    """Returns w0, the side in tokens of the window of pre-training, from a table of coordinates.

    If the table does not show w0, since w is 1 or `largest` is not positive and finite, the result
    is w.

    Args:
        largest: Largest entry of the table, which is log2(8 (w - 1) / (w0 - 1) + 1) / 3.
        window: w, the side of the table's window in tokens.
    """
    if window < 2 or not math.isfinite(largest) or largest <= 0:
        return window
    return round(8 * (window - 1) / (2 ** (3 * largest) - 1)) + 1


def _hugging_face(config: dict[str, Any], where: str) -> Architecture | None:
    """Returns the architecture fields that transformers' config.json of a SwinV2 states.

    Where its `pretrained_window_sizes` is 0 or missing, the result has the side of the stage's
    window: the smaller of `window_size` and the side of the stage's map.

    Args:
        config: Contents of config.json. For a model of another type, the result is None.
        where: Field that the user set, for messages.

    Raises: WeightsError: for an unsupported activation.
    """
    if config.get("model_type") != "swinv2":
        return None
    fields = names.hugging_face_fields(config, where)
    side = config["image_size"] // config["patch_size"]
    stages = range(len(config["depths"]))
    windows = tuple(config.get("pretrained_window_sizes", ())) or (0,) * len(stages)
    return Architecture(
        pretrained_window_sizes=tuple(
            windows[s] or min(fields["window_size"], side // 2**s) for s in stages
        ),
        **fields,
    )


def _timm(net: Any, where: str) -> Architecture | None:
    """Returns the architecture fields of `net`, a SwinV2 module of timm; None for another module.

    Where the module's `pretrained_window_size` is 0, the result has the side of the stage's window.
    """
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    if not isinstance(net, SwinTransformerV2):
        return None
    blocks = [stage.blocks[0] for stage in net.layers]
    return Architecture(
        pretrained_window_sizes=tuple(
            block.attn.pretrained_window_size[0] or block.window_size[0] for block in blocks
        ),
        **names.timm_fields(net),
    )


def shared_bias(name: str) -> str:
    """Returns the name of a stage's shared tensor of the position-bias MLP.

    Args:
        name: Name of the same tensor in a block. The name of any other tensor is returned
            unchanged.
    """
    return re.sub(r"blocks\.\d+\.attn\.cpb_mlp\.", "position_bias.cpb_mlp.", name)


def _adapt(pieces: Pieces, target: TargetModel) -> tuple[Pieces, list[str]]:
    pieces, notes = names.first_stages(pieces, target)
    pieces, copied = expanded(pieces, target.shapes, shared_bias)
    return pieces, [*notes, *copied]


def _complete(values: dict[str, Any], settling: Settling) -> list[str]:
    """Fills the image size and the windows of pre-training in place; returns notes for the log.

    An unknown image size of a model without absolute positions, whose tensors do not depend on this
    size, becomes the size at which the map of the last stage is one window. The windows of
    pre-training become those of the file, whatever window the model has, unless the user set them.

    Args:
        values: {field: value} of the model, None in undecided fields.
        settling: Fields that the file and the user state.
    """
    window, stages = values["window_size"], len(values["depths"] or ())
    if values["image_size"] is None and not values["absolute_position"]:
        if window is None or values["patch_size"] is None:
            del values["image_size"]  # Follows from fields that are asked for.
        else:
            values["image_size"] = window * values["patch_size"] * 2 ** max(stages - 1, 0)
    field = "pretrained_window_sizes"
    if getattr(settling.given, field) is not None:
        return []
    known = getattr(settling.known, field)
    if known is None and settling.is_named:
        return [f"the file does not show its window size: window {window} of the model is assumed"]
    if known is None:
        return []
    before = settling.known
    if before.window_size and before.image_size and before.patch_size:
        if before.window_size == window:
            values[field] = known
            return []
        # A run's own student, now with another window than in training.
        known = trained_windows(known, before.window_size, before.image_size // before.patch_size)
    values[field] = tuple(known[: stages or len(known)])
    if window is None or max(known) == window:
        return []
    return [
        f"window {window} in place of {max(known)}: coordinates are scaled by the windows of the "
        f"file, {' '.join(map(str, known))}"
    ]


def _same_norms(fact: int, requested: int, depths: tuple[int, ...]) -> bool:
    """Whether two values of `extra_norm_every` give the same extra norms.

    A value of 0, or larger than the number of blocks of every stage, gives none.

    Args:
        fact: Value of the file.
        requested: Value of the model.
        depths: Number of blocks of each stage.
    """
    return (
        all(k > max(depths) for k in (fact or math.inf, requested or math.inf)) or fact == requested
    )


_MICROSOFT = WeightFacts(IMAGENET, 192, "MIT", "github.com/microsoft/Swin-Transformer")

PUBLISHED = Published(
    formats=FORMATS,
    recognise=recognise,
    configs={"hf": _hugging_face, "timm": _timm},
    adapt=_adapt,
    free=names.FREE | {"pretrained_window_sizes"},
    agree={
        **names.AGREE,
        "extra_norm_every": _same_norms,
        # What is shared can be copied to every block.
        "shared_position_bias": lambda fact, requested, depths: fact == requested or fact,
    },
    complete=_complete,
    without_shape=lambda known: {
        "norm_eps": 1e-6,
        "window_size": 1,
        "pretrained_window_sizes": (0,) * len(known.depths or ()),
        "image_size": 1,
    },
    facts=dict.fromkeys(("swinv2_base", "swinv2_large", "swinv2_1b"), _MICROSOFT),
)
