"""The one table of published formats: how each is told from its names, and who translates it.

Pure functions of names. Our own files use the names of the models themselves, which are the official
repositories', and pass through the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP, Statistics
from fd_large.errors import WeightsError, nearest
from fd_large.recipes.architectures import Architecture
from fd_large.weights import swin, vit
from fd_large.weights.translation import Target, translated

Names = frozenset[str]

_NOTHING = Architecture()


@dataclass(frozen=True)
class Format:
    """A layout of names.

    Attributes:
        what: In words, for messages.
        family: Of the model.
        tell_tale: Whether names, and the keys that they stood under, are of this format; the
            table's first match counts.
        rule: A name to its target; None drops it on purpose.
        facts: What all its files have in common and no name tells.
        ask: Fields that files of this format differ in and no name tells: a config beside the
            file or the user must.
        statistics: That all its files were trained with; None: they differ.
        refusal: Why models of this format cannot be read; empty: they can.
    """

    what: str
    family: str
    tell_tale: Callable[[Names, tuple[str, ...]], bool]
    rule: Callable[[str], Target | None]
    facts: Architecture = _NOTHING
    ask: tuple[str, ...] = ()
    statistics: Statistics | None = None
    refusal: str = ""


def _any(names: Names, *pieces: str) -> bool:
    return any(all(piece in name for piece in pieces) for name in names)


def _starts(names: Names, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _timm_swin(names: Names) -> bool:
    # timm merges at the start of a stage: the first stage then has no downsample, the second has.
    return _any(names, "layers.1.downsample.") and not _any(names, "layers.0.downsample.")


def _plain_vit(names: Names) -> bool:
    return "blocks.0.attn.qkv.weight" in names and "patch_embed.proj.weight" in names


_TABLE = ".relative_position_bias_table"
_GELU_6 = Architecture(norm_eps=1e-6, activation="gelu")
_EPS_5 = Architecture(norm_eps=1e-5)

FORMATS: dict[str, Format] = {
    "simmim_swinv2": Format(
        "SimMIM's SwinV2",
        "swinv2",
        lambda n, w: _any(n, "mask_token") and (_any(n, ".cpb_mlp.") or _any(n, ".rpe_mlp.")),
        swin.simmim,
        _EPS_5,
        statistics=IMAGENET,
    ),
    "openai_clip": Format(
        "OpenAI CLIP's image tower",
        "vit",
        lambda n, w: "visual.class_embedding" in n and "input_resolution" in n,
        vit.clip,
        Architecture(norm_eps=1e-5, activation="quick_gelu"),
        statistics=OPENAI_CLIP,
    ),
    "open_clip_timm": Format(
        "open_clip with an image tower of timm",
        "vit",
        lambda n, w: "visual.trunk.blocks.0.attn.qkv.weight" in n,
        vit.open_clip_trunk,
        ask=("norm_eps", "activation"),
    ),
    "open_clip": Format(
        "open_clip's image tower",
        "vit",
        lambda n, w: "visual.class_embedding" in n,
        vit.clip,
        _EPS_5,
        ask=("activation",),
        statistics=OPENAI_CLIP,
    ),
    "hf_clip": Format(
        "Hugging Face CLIP",
        "vit",
        lambda n, w: _any(n, "embeddings.class_embedding"),
        vit.hugging_face_clip,
        ask=("norm_eps", "activation"),
        statistics=OPENAI_CLIP,
    ),
    "hf_beit": Format(
        "Hugging Face BEiT",
        "vit",
        lambda n, w: _any(n, "embeddings.cls_token") and (_any(n, ".lambda_1") or _any(n, _TABLE)),
        vit.hugging_face_beit,
        ask=("norm_eps", "activation"),
    ),
    "hf_vit": Format(
        "Hugging Face ViT or DeiT",
        "vit",
        lambda n, w: _any(n, "embeddings.cls_token") and _any(n, "embeddings.patch_embeddings."),
        vit.hugging_face_vit,
        ask=("norm_eps", "activation"),
    ),
    "hf_swinv2": Format(
        "Hugging Face Swin V2",
        "swinv2",
        lambda n, w: _any(n, "attention.self.continuous_position_bias_mlp."),
        partial(swin.hugging_face, version=2),
        ask=("norm_eps",),
    ),
    "hf_swin": Format(
        "Hugging Face Swin",
        "swin",
        lambda n, w: _any(n, "attention.self" + _TABLE),
        partial(swin.hugging_face, version=1),
        ask=("norm_eps",),
    ),
    "timm_swinv2_cr": Format(
        "timm's other SwinV2 (swinv2_cr_*)",
        "swinv2",
        lambda n, w: _starts(n, "stages.") and _any(n, ".meta_mlp."),
        Target,
        refusal="it is another model: another position bias, another order in merging, no final "
        "norm. Use --teacher.source timm:swinv2_cr_...",
    ),
    "fd_swinv2": Format(
        "Feature-Distillation SwinV2 student",
        "swinv2",
        lambda n, w: _any(n, ".rpe_mlp."),
        swin.fd,
        _EPS_5,
        statistics=IMAGENET,
    ),
    # Shares a bias among its blocks, as Feature-Distillation's students do.
    "beit_pretraining": Format(
        "BEiT's masked pre-training",
        "vit",
        lambda n, w: "lm_head.weight" in n and _starts(n, "rel_pos_bias."),
        vit.fd,
        _GELU_6,
    ),
    "fd_vit": Format(
        "Feature-Distillation ViT student",
        "vit",
        lambda n, w: _starts(n, "encoder.blocks.") or _starts(n, "rel_pos_bias."),
        vit.fd,
        _GELU_6,
        statistics=IMAGENET,
    ),
    "timm_swinv2": Format(
        "timm's SwinV2",
        "swinv2",
        lambda n, w: _any(n, ".cpb_mlp.") and _timm_swin(n),
        swin.timm,
        _EPS_5,
    ),
    "timm_swin": Format(
        "timm's Swin",
        "swin",
        lambda n, w: _any(n, "layers.", _TABLE) and _timm_swin(n),
        swin.timm,
        _EPS_5,
    ),
    "swinv2": Format(
        "Swin-Transformer's SwinV2",
        "swinv2",
        lambda n, w: _any(n, ".cpb_mlp."),
        swin.official,
        _EPS_5,
        statistics=IMAGENET,
    ),
    "esvit": Format(
        "EsViT's Swin",
        "swin",
        lambda n, w: (
            _any(n, "layers.", _TABLE)
            and (_starts(n, "head_dense.") or _starts(n, "head.mlp.") or w[-1:] == ("student",))
        ),
        swin.official,
        # FD's teacher; EsViT itself trained with 1e-6.
        _EPS_5,
        statistics=IMAGENET,
    ),
    "swin": Format(
        "Swin-Transformer's Swin V1",
        "swin",
        lambda n, w: _any(n, "layers.", _TABLE),
        swin.official,
        _EPS_5,
        statistics=IMAGENET,
    ),
    "beit": Format(
        "BEiT (timm's or its own), or a fine-tuned Feature-Distillation ViT",
        "vit",
        lambda n, w: "blocks.0.attn.q_bias" in n,
        vit.fd,
        _GELU_6,
    ),
    "deit": Format(
        "DeiT",
        "vit",
        lambda n, w: (
            _plain_vit(n) and ("dist_token" in n or (w == ("model",) and "head.bias" in n))
        ),
        vit.plain,
        _GELU_6,
        statistics=IMAGENET,
    ),
    "timm_clip": Format(
        "timm's ViT of a CLIP",
        "vit",
        lambda n, w: _plain_vit(n) and _starts(n, "norm_pre."),
        vit.plain,
        _EPS_5,
        ask=("activation",),
        statistics=OPENAI_CLIP,
    ),
    "timm_vit": Format(
        "timm's ViT",
        "vit",
        lambda n, w: _plain_vit(n) and (_starts(n, "head.") or _starts(n, "fc_norm.")) and not w,
        vit.plain,
        _GELU_6,
    ),
    "dino": Format(
        "DINO, for which any ViT of these names without a head is taken",
        "vit",
        lambda n, w: _plain_vit(n),
        vit.plain,
        _GELU_6,
        statistics=IMAGENET,
    ),
}


def detect(names: Iterable[str], *, where: str = "weights", wrapping: tuple[str, ...] = ()) -> str:
    """Returns the format's name.

    Args:
        names: Of a file's tensors.
        where: What the user set, for messages.
        wrapping: Keys that the tensors stood under, outermost first.

    Raises: WeightsError: if the names are of no format in the table, or of one that no model here
        can take.
    """
    names = frozenset(names)
    for name, form in FORMATS.items():
        if form.tell_tale(names, wrapping):
            if form.refusal:
                raise WeightsError(
                    f"{where}: weights that no model here can take; got {form.what}, expected one of "
                    f"{', '.join(FORMATS)}: {form.refusal}"
                )
            return name
    known = "; ".join(form.what for form in FORMATS.values() if not form.refusal)
    raise WeightsError(
        f"{where}: names of no known format; got {', '.join(sorted(names)[:5])}, ..., expected one "
        f"of: {known}. Convert the file, or rename its tensors to the net's own names."
    )


def translate(form: str, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for every tensor that is not dropped on purpose.

    The projection of a student's file comes as `projection.weight` (Ct, Cs) and `projection.bias`.

    Raises: WeightsError: if there is no such format.
    """
    if form not in FORMATS:
        raise WeightsError(
            f"weights: no such format; got {form!r}, {nearest(form, FORMATS)}. Use one of these."
        )
    tensors = dict(items)
    for name, piece in translated(tensors, FORMATS[form].rule).pieces.items():
        yield name, piece.read(tensors)
