"""Published weights of Swin Transformer, first version."""

from __future__ import annotations

from typing import Any

from fd_large.backbones import hierarchical_published as names
from fd_large.backbones.published import (
    Format,
    Published,
    TensorFile,
    WeightFacts,
)
from fd_large.backbones.recognition import count_of, grid_of, size_to_compare
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.translation import Shapes, table
from fd_large.recipes.architectures import Architecture

_TABLE = ".relative_position_bias_table"


_TABLES = r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$"

FORMATS = {
    "hf_swin": Format(
        "Hugging Face Swin",
        (r"attention\.self\.relative_position_bias_table",),
        names.HF_SWIN,
        ask=("norm_eps",),
        library="hf",
    ),
    "mmseg_swin": names.imagenet_format(
        "mmsegmentation's Swin",
        (r"stages\.\d+\.blocks\.\d+\.attn\.w_msa\.relative_position_bias_table",),
        names.MMSEG,
    ),
    "simmim_swin": names.imagenet_format(
        "SimMIM's Swin",
        (rf"^encoder\.{_TABLES}",),
        table(names.OF_SIMMIM, start="{|encoder.}"),
    ),
    "timm_swin": names.imagenet_format(
        "timm's Swin",
        (_TABLES, r"layers\.1\.downsample\."),
        names.TIMM,
        without=r"layers\.0\.downsample\.",
    ),
    # Feature-Distillation's teacher; EsViT itself trained with eps 1e-6.
    "esvit": names.imagenet_format(
        "EsViT's Swin",
        (_TABLES, r"^head_dense\.|^head\.mlp\.|^in (.*\.)?student$"),
        names.OFFICIAL,
        models="swin_base_esvit",
    ),
    "swin": names.imagenet_format("Swin-Transformer's Swin V1", (_TABLES,), names.OFFICIAL),
}


def _tables(shapes: Shapes, stages: int) -> list[tuple[int, ...]]:
    """Returns (rows, heads) of the position table of the first block of each stage.

    The pair is (0, 0) if there is no table.

    Args:
        shapes: {our name: shape} of the file's tensors.
        stages: Number of stages.
    """
    return [shapes.get(f"layers.{s}.blocks.0.attn{_TABLE}", (0, 0)) for s in range(stages)]


def _beyond(shapes: Shapes) -> str:
    """Returns, in words, a part of the file that no Swin model here has, or "" if there is none.

    Args:
        shapes: {our name: shape} of the file's tensors.
    """
    stages = count_of(shapes, r"layers\.(\d+)\.")
    windows = [grid_of(rows) for rows, _ in _tables(shapes, stages)]
    return "" if windows == sorted(windows, reverse=True) else "a larger window in a later stage"


def recognise(shapes: Shapes, file: TensorFile) -> Architecture:
    """Returns the architecture fields that a file's tensors show: all except `norm_eps`.

    Args:
        shapes: Shapes of the file's tensors, by our names.
        file: The file; not used.
    """
    fields = names.recognised(shapes)
    tables = _tables(shapes, len(fields["depths"]))
    heads = tuple(heads for _, heads in tables)
    windows = [grid_of(rows) for rows, _ in tables]
    return Architecture(
        family="swin",
        num_heads=heads if all(heads) else None,
        **fields,
        **names.window_and_size(fields, windows, 0, shapes),
    )


def _hugging_face(config: dict[str, Any], where: str) -> Architecture | None:
    if config.get("model_type") != "swin":
        return None
    return Architecture(**names.hugging_face_fields(config, where))


def _timm(net: Any, where: str) -> Architecture | None:
    from timm.models.swin_transformer import SwinTransformer

    if type(net) is not SwinTransformer:
        return None
    windows = [block.window_size[0] for stage in net.layers for block in stage.blocks]
    if windows != sorted(windows, reverse=True):  # Ours has one, which smaller maps cut.
        return None
    return Architecture(**names.timm_fields(net))


_ESVIT = WeightFacts(IMAGENET, 224, "MIT", "github.com/microsoft/esvit")

PUBLISHED = Published(
    formats=FORMATS,
    recognise=recognise,
    configs={"hf": _hugging_face, "timm": _timm},
    adapt=names.first_stages,
    beyond=_beyond,
    free=names.FREE,
    agree=names.AGREE,
    without_shape=lambda known: {"norm_eps": 1e-6, **size_to_compare(known)},
    facts={"swin_base_esvit": _ESVIT, "swin_base_esvit_s3": _ESVIT},
)
