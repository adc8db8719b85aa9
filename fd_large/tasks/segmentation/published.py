"""Translates segmentation heads to and from the names of mmsegmentation and transformers.

The heads compute the same functions in all packages; only the names of tensors differ. The names of
a backbone's tensors are in its family's files (`backbones/FAMILY/export.py` and `published.py`).

Sources: mmsegmentation 1.2 (UPerHead, FCNHead, Feature2Pyramid), Swin's and BEiT's own segmentation
code (norms and pyramid under the backbone's name), transformers 5 (UperNetForSemanticSegmentation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fd_large.backbones.exports import Export
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Rows, Shapes, table, translated, under
from fd_large.errors import ConfigError, WeightsError
from fd_large.tasks.segmentation.heads.uper_head import POOLS
from fd_large.weights.coverage import Fitted
from fd_large.weights.libraries import To
from fd_large.weights.read import Tensors

CLASSIFIER = "head.classifier.convolution.weight"


def _layout(norm: str, classifier: str, maps: str) -> Rows:
    """Returns the table that translates the names of heads' tensors from a library to this package.

    Args:
        norm: The library's name of the norm after a convolution.
        classifier: The library's name of a head's last layer.
        maps: Further lines of the table, for the neck.
    """
    return table(f"""
decode_head.psp_modules.#.1.conv.*          head.pools.#.convolution.*
decode_head.psp_modules.#.1.{norm}.*        head.pools.#.norm.*
decode_head.bottleneck.conv.*               head.pooled.convolution.*
decode_head.bottleneck.{norm}.*             head.pooled.norm.*
decode_head.lateral_convs.#.conv.*          head.laterals.#.convolution.*
decode_head.lateral_convs.#.{norm}.*        head.laterals.#.norm.*
decode_head.fpn_convs.#.conv.*              head.outputs.#.convolution.*
decode_head.fpn_convs.#.{norm}.*            head.outputs.#.norm.*
decode_head.fpn_bottleneck.conv.*           head.fused.convolution.*
decode_head.fpn_bottleneck.{norm}.*         head.fused.norm.*
decode_head.{classifier}.*                  head.classifier.convolution.*
auxiliary_head.convs.0.conv.*               auxiliary.convolution.convolution.*
auxiliary_head.convs.0.{norm}.*             auxiliary.convolution.norm.*
auxiliary_head.{classifier}.*               auxiliary.classifier.convolution.*
{maps}
""")


# A linear head, as DINOv2 has it, is a norm and the last layer.
_MMSEG = """
backbone.norm#.*                            neck.norm#.*
neck.upsample_4x.*                          neck.fourfold.*
neck.upsample_2x.0.*                        neck.twofold.*
decode_head.bn.*                            head.norm.*
"""
_TRANSFORMERS = """
backbone.hidden_states_norms.stage+.*       neck.norm#.*
backbone.fpn1.*                             neck.fourfold.*
backbone.fpn2.0.*                           neck.twofold.*
"""
LAYOUTS: Mapping[str, Rows] = {
    "mmseg": _layout("bn", "conv_seg", _MMSEG),
    "upernet": _layout("batch_norm", "classifier", _TRANSFORMERS),
}
# A norm with a fixed momentum does not use the number of batches.
HEADS = (
    *table("*.num_batches_tracked -"),
    *LAYOUTS["mmseg"],
    *LAYOUTS["upernet"],
    *table("* -"),
)


class Heads(NamedTuple):
    """The heads and the test of a run, for the configuration files of other libraries.

    Attributes:
        widths: Channels of the four maps.
        width: Channels of the head.
        names: Names of the classes.
        auxiliary_width: Channels of the auxiliary head; 0 for none.
        auxiliary_weight: Weight of the auxiliary head's loss.
        scales: Factors by which a ViT's maps are rescaled; empty for a model with stages.
        blocks: Numbers of the ViT's blocks that provide the maps, counted from 0; empty for a model
            with stages.
        window: Side of the test's windows, in pixels; 0 for whole images.
        window_stride: Distance from window to window, in pixels.
    """

    widths: tuple[int, ...]
    width: int
    names: tuple[str, ...]
    auxiliary_width: int
    auxiliary_weight: float
    scales: tuple[float, ...]
    blocks: tuple[int, ...]
    window: int
    window_stride: int


def whole_export(backbone: Export, to: To, heads: Heads) -> Export:
    """Returns the export of a student together with its heads.

    Args:
        backbone: The export of the student alone.
        to: The format, a name in the table `LAYOUTS`.
        heads: The heads and the test.

    Raises:
        ConfigError: if a ViT has so few blocks that two of the four maps come from one block, or if
            the library rescales the maps of a ViT by other factors than `heads.scales`.
    """
    if len(set(heads.blocks)) < len(heads.blocks):
        raise ConfigError(
            f"export: --to {to}: needs four different blocks of a ViT; got {heads.blocks}, "
            "expected a model of six blocks or more. Use another --to, which exports only the "
            "backbone."
        )
    if to == "upernet" and heads.scales and heads.scales != (4, 2, 1, 0.5):
        raise ConfigError(
            f"export: --to upernet: maps of other scales; got scales {heads.scales}, expected 4, "
            "2, 1, 0.5, which a patch of more than 8 pixels gives. Use --to mmseg."
        )

    def rows(architecture: Any) -> Rows:
        backbone_rows = backbone.rows(architecture) + table("* *")
        # No head reads the output of the final norm.
        return (*LAYOUTS[to], *table("- norm.*"), *under("backbone.", backbone_rows))

    def config(architecture: Any, statistics: Statistics) -> dict[str, Any]:
        backbone_config = backbone.config(architecture, statistics)
        if to == "upernet":
            return _upernet(backbone_config, heads)
        return {"mmsegmentation": _mmsegmentation(backbone_config, heads, statistics)}

    return replace(
        backbone,
        names=lambda a: f"{backbone.names(a)}, with heads",
        rows=rows,
        added=lambda a: {f"backbone.{n}": t for n, t in backbone.added(a).items()},
        config=config if backbone.config else None,
        class_name=lambda a: "UperNetForSemanticSegmentation" if to == "upernet" else "",
    )


def _upernet(backbone: dict[str, Any], heads: Heads) -> dict[str, Any]:
    if heads.blocks:
        # The library numbers the outputs of the blocks from 1.
        backbone = backbone | {"out_indices": [block + 1 for block in heads.blocks]}
    return {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": "upernet",
        "dtype": "float32",
        "backbone_config": backbone,
        "hidden_size": heads.width,
        "pool_scales": list(POOLS),
        "use_auxiliary_head": heads.auxiliary_width > 0,
        "auxiliary_loss_weight": heads.auxiliary_weight,
        "auxiliary_channels": heads.auxiliary_width,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": 255,
        "id2label": {str(i): name for i, name in enumerate(heads.names)},
        "label2id": {name: i for i, name in enumerate(heads.names)},
    }


def _mmsegmentation(
    backbone: dict[str, Any], heads: Heads, statistics: Statistics
) -> dict[str, Any]:
    common = {
        "num_classes": len(heads.names),
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "align_corners": False,
        "dropout_ratio": 0.1,
    }
    model: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": [255 * value for value in statistics.mean],
            "std": [255 * value for value in statistics.std],
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
        },
        "backbone": backbone,
        "decode_head": common
        | {
            "type": "UPerHead",
            "in_channels": list(heads.widths),
            "in_index": [0, 1, 2, 3],
            "pool_scales": list(POOLS),
            "channels": heads.width,
        },
        "test_cfg": _test(heads),
    }
    if heads.blocks:
        model["backbone"] = backbone | {"out_indices": list(heads.blocks)}
        model["neck"] = {
            "type": "Feature2Pyramid",
            "embed_dim": heads.widths[0],
            "rescales": list(heads.scales),
            "norm_cfg": common["norm_cfg"],
        }
    if heads.auxiliary_width:
        model["auxiliary_head"] = common | {
            "type": "FCNHead",
            "in_channels": heads.widths[2],
            "in_index": 2,
            "channels": heads.auxiliary_width,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": heads.auxiliary_weight},
        }
    return model


def _test(heads: Heads) -> dict[str, Any]:
    """Returns mmsegmentation's `test_cfg`, by which it tests whole images or windows.

    If `heads.window` is 0, the mode is "whole". Otherwise the mode is "slide", and the result also
    has the size and the distance of the windows.
    """
    if not heads.window:
        return {"mode": "whole"}
    size, stride = ([side, side] for side in (heads.window, heads.window_stride))
    return {"mode": "slide", "crop_size": size, "stride": stride}


def fitted_heads(file: Tensors, expected: Shapes, *, label: str, where: str) -> dict[str, Fitted]:
    """Finds the weights of heads and neck in the file of a whole segmentation model.

    Only the file's header is read at first; iterating over a module's weights reads them.

    Args:
        file: The tensors of the file.
        expected: {name in this package: shape} of the tensors of heads and neck.
        label: Name of the file, for messages.
        where: The field that the user set, for messages.

    Returns: {name of a module of the task: the module's weights}, without the student.
    Raises: WeightsError: if the file lacks these heads, or has another number of classes.
    """
    pieces = translated(file, HEADS).pieces
    if CLASSIFIER not in pieces:
        raise WeightsError(
            f"{where}: {label}: no heads of segmentation; got {', '.join(sorted(file)[:3])}, ..., "
            "expected decode_head.* in the names of mmsegmentation or transformers. Leave out "
            f"{where}: new heads start from random weights."
        )
    classes, needed = pieces[CLASSIFIER].shape(file.shape)[0], expected[CLASSIFIER][0]
    if classes != needed:
        raise WeightsError(
            f"{where}: {label}: heads for other classes; got {classes} classes, expected {needed} "
            "(task.segmentation.num_classes). Change task.segmentation.num_classes, or leave "
            f"{where} out: new heads start from random weights."
        )
    modules = dict.fromkeys(name.partition(".")[0] for name in expected)
    return {
        module: Fitted(
            _under(module, pieces),
            file,
            _under(module, expected),
            label=f"{label}, {module}",
            where=where,
            remedy="Set --task.segmentation.head, head_width and auxiliary_weight as the file has "
            "them, or leave the heads out: new heads start from random weights.",
        )
        for module in modules
    }


def _under(module: str, named: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{module}."
    return {n.removeprefix(start): value for n, value in named.items() if n.startswith(start)}
