"""Published weights of vision transformers: names, formats, and what is known of their models."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fd_large.backbones.published import (
    Format,
    Published,
    TensorFile,
    Wanted,
    WeightFacts,
    any_has,
    any_starts,
)
from fd_large.backbones.recognition import (
    activation_named,
    count_of,
    grid_of,
    mlp_ratio,
    qkv_bias,
    side_of,
    size_to_compare,
)
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.backbones.translation import (
    RECOMPUTED,
    Pieces,
    Shapes,
    Target,
    expanded,
    fresh_norm,
    projection,
    replaced,
)
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture

_CLIP_PARTS = (
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ls_1.gamma", ".gamma_1"),
    (".ls_2.gamma", ".gamma_2"),
    ("conv1.weight", "patch_embed.proj.weight"),
)
_HF_CLIP_PARTS = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.", ".attn."),
    (".out_proj.", ".proj."),
)
# Names that transformers stored up to version 4 and stores still; then those of 5 in memory.
_HF_VIT_PARTS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    (".attention.attention.query.", ".attn.q_proj."),
    (".attention.attention.key.", ".attn.k_proj."),
    (".attention.attention.value.", ".attn.v_proj."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.", ".attn."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
# BEiT's names are replaced before those of the ViT.
_HF_BEIT_PARTS = (
    ("encoder.relative_position_bias.", "rel_pos_bias."),
    ("shared_position_bias.", "rel_pos_bias."),
    (".attention.attention.relative_position_bias.", ".attn."),
    (".relative_position_bias.", ".attn."),
    (".lambda_", ".gamma_"),
)
_LAYER_SCALE = ((".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"))
_THIRDS = {"q": 0, "k": 1, "v": 2}

TEXT_PROJECTIONS = {"visual.proj": True, "visual_projection.weight": False}
"""The projection of CLIP's class token into the space of texts, in the names of OpenAI and
open_clip and in those of transformers, and whether it is transposed: (width, embedding)."""

# --- rules of names ---


def clip(name: str) -> Target | None:
    """OpenAI's and open_clip's image tower; the text tower and the projection are dropped."""
    if not name.startswith("visual.") or name == "visual.proj":
        return None
    name = name.removeprefix("visual.")
    if name == "class_embedding":
        return Target("cls_token", form="token")
    if name == "positional_embedding":
        return Target("pos_embed", form="batched")
    return Target(replaced(name, _CLIP_PARTS))


def open_clip_trunk(name: str) -> Target | None:
    """An image tower that open_clip took from timm."""
    if not name.startswith("visual.trunk."):
        return None
    return plain(name.removeprefix("visual.trunk."))


def hugging_face_clip(name: str) -> Target | None:
    """Hugging Face's CLIP, whole or the image tower alone."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
        return None
    name = name.removeprefix("vision_model.")
    if name.endswith("position_ids") or name.startswith("classifier."):
        return None
    if name == "embeddings.class_embedding":
        return Target("cls_token", form="token")
    if name == "embeddings.position_embedding.weight":
        return Target("pos_embed", form="batched")
    return _fused(replaced(name, _HF_CLIP_PARTS))


def hugging_face_vit(name: str) -> Target | None:
    """Hugging Face's ViT and DeiT."""
    name = name.removeprefix("vit.").removeprefix("deit.")
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.", "pooler.", "decoder.")
    if name.startswith(heads) or name == "embeddings.mask_token":
        return None
    if name.startswith("layernorm."):
        return Target(name.replace("layernorm.", "norm."))
    return _fused(replaced(name, _HF_VIT_PARTS))


def hugging_face_beit(name: str) -> Target | None:
    """Hugging Face's BEiT; a norm for the mean of the tokens is its pooler's, and dropped."""
    name = name.removeprefix("beit.")
    if name.startswith("lm_head.") or name.endswith(RECOMPUTED):
        return None
    target = hugging_face_vit(replaced(name, _HF_BEIT_PARTS))
    if target and (bias := re.fullmatch(r"(.*\.attn\.)qkv\.bias", target.name)):
        return Target(f"{bias[1]}{'qkv'[target.third]}_bias")
    return target


def plain(name: str) -> Target | None:
    """DINO, DeiT and timm share our names; their heads are dropped, also a head's own norm.

    So is what iBOT's student puts in the place of masked patches.
    """
    if name.startswith(("head.", "head_dist.", "fc_norm.", "masked_embed")):
        return None
    return Target(replaced(name, _LAYER_SCALE))


def feature_distillation(name: str) -> Target | None:
    """Feature-Distillation and BEiT: heads are dropped, the projection is kept."""
    if name.startswith("decoder.0."):
        return projection(name)
    name = name.removeprefix("encoder.")
    if name.endswith(RECOMPUTED) or name == "mask_token":
        return None
    if name.startswith(("feature_model.", "head.", "fc_norm.", "lm_head.")):
        return None
    return Target(name)


_MMSEG = (
    ("patch_embed.projection.", "patch_embed.proj."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
    (".attn.attn.in_proj_", ".attn.qkv."),
    (".attn.attn.out_proj.", ".attn.proj."),
)


def mmseg(name: str) -> Target | None:
    """mmsegmentation's BEiT, MAE and VisionTransformer."""
    if name.endswith(RECOMPUTED):
        return None
    name = re.sub(r"^layers\.", "blocks.", name)
    return Target(replaced(re.sub(r"^ln1\.", "norm.", name), _MMSEG))


def _fused(name: str) -> Target:
    part = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
    return Target(f"{part[1]}qkv.{part[3]}", _THIRDS[part[2]]) if part else Target(name)


# --- formats ---


def _is_plain(names: frozenset[str]) -> bool:
    return "blocks.0.attn.qkv.weight" in names and "patch_embed.proj.weight" in names


_PUBLISHERS = (
    "0.485 0.456 0.406 0.229 0.224 0.225 for DINO, DeiT and MAE, 0.5 0.5 0.5 0.5 0.5 0.5 for "
    "timm's augreg and SigLIP; the page of the weights says which"
)
_CLIPS = (
    "0.48145466 0.4578275 0.40821073 0.26862954 0.26130258 0.27577711 for most CLIPs, 0.5 0.5 0.5 "
    "0.5 0.5 0.5 for some of LAION's; the page of the weights says which"
)
_BEITS = (
    "0.5 0.5 0.5 0.5 0.5 0.5 for BEiT, 0.485 0.456 0.406 0.229 0.224 0.225 for BEiT v2 and "
    "Feature-Distillation"
)
_GELU_6 = Architecture(norm_eps=1e-6, activation="gelu")
_EPS_5 = Architecture(norm_eps=1e-5)
# DINO asks for a grid that much larger, against rounding down; it changes the values a little.
_DINO_MARGIN = 0.1
_ASK = ("norm_eps", "activation")

FORMATS = {
    "clip_resnet": Format(
        "a CLIP's ResNet",
        lambda n, w: any_starts(n, "visual.attnpool."),
        clip,
        refusal="timm has these models with their weights: --teacher.source timm:resnet50_clip, "
        "timm:resnet101_clip, timm:resnet50x4_clip, timm:resnet50x16_clip, timm:resnet50x64_clip.",
    ),
    "openai_clip": Format(
        "OpenAI CLIP's image tower",
        lambda n, w: "visual.class_embedding" in n and "input_resolution" in n,
        clip,
        Architecture(norm_eps=1e-5, activation="quick_gelu"),
        statistics=OPENAI_CLIP,
        models="clip_",
    ),
    "open_clip_timm": Format(
        "open_clip with an image tower of timm",
        lambda n, w: "visual.trunk.blocks.0.attn.qkv.weight" in n,
        open_clip_trunk,
        ask=_ASK,
        library="open_clip",
    ),
    "open_clip": Format(
        "open_clip's image tower",
        lambda n, w: "visual.class_embedding" in n,
        clip,
        _EPS_5,
        ask=("activation",),
        trained_with=_CLIPS,
        library="open_clip",
    ),
    "hf_clip": Format(
        "Hugging Face CLIP",
        lambda n, w: any_has(n, "embeddings.class_embedding"),
        hugging_face_clip,
        ask=_ASK,
        statistics=OPENAI_CLIP,
        library="hf",
    ),
    "hf_beit": Format(
        "Hugging Face BEiT",
        lambda n, w: (
            any_has(n, "embeddings.cls_token")
            and (any_has(n, ".lambda_1") or any_has(n, ".relative_position_bias_table"))
        ),
        hugging_face_beit,
        ask=_ASK,
        library="hf",
    ),
    "hf_vit": Format(
        "Hugging Face ViT or DeiT",
        lambda n, w: (
            any_has(n, "embeddings.cls_token") and any_has(n, "embeddings.patch_embeddings.")
        ),
        hugging_face_vit,
        ask=_ASK,
        library="hf",
    ),
    "mmseg_vit": Format(
        "mmsegmentation's BEiT, MAE or VisionTransformer",
        lambda n, w: "layers.0.ln1.weight" in n and "patch_embed.projection.weight" in n,
        mmseg,
        _GELU_6,
        trained_with=_BEITS,
    ),
    # Shares a bias among its blocks, as Feature-Distillation's students do.
    "beit_pretraining": Format(
        "BEiT's masked pre-training",
        lambda n, w: "lm_head.weight" in n and any_starts(n, "rel_pos_bias."),
        feature_distillation,
        _GELU_6,
    ),
    "fd_vit": Format(
        "Feature-Distillation ViT student",
        lambda n, w: any_starts(n, "encoder.blocks.") or any_starts(n, "rel_pos_bias."),
        feature_distillation,
        _GELU_6,
        statistics=IMAGENET,
    ),
    "beit": Format(
        "BEiT (timm's or its own), or a fine-tuned Feature-Distillation ViT",
        lambda n, w: "blocks.0.attn.q_bias" in n,
        feature_distillation,
        _GELU_6,
        trained_with=_BEITS,
    ),
    "deit": Format(
        "DeiT",
        lambda n, w: _is_plain(n) and ("dist_token" in n or (w == ("model",) and "head.bias" in n)),
        plain,
        _GELU_6,
        statistics=IMAGENET,
        models="deit_",
    ),
    "timm_clip": Format(
        "timm's ViT of a CLIP",
        lambda n, w: _is_plain(n) and any_starts(n, "norm_pre."),
        plain,
        _EPS_5,
        ask=("activation",),
        trained_with=_CLIPS,
    ),
    "timm_vit": Format(
        "timm's ViT",
        lambda n, w: (
            _is_plain(n) and (any_starts(n, "head.") or any_starts(n, "fc_norm.")) and not w
        ),
        plain,
        _GELU_6,
        trained_with=_PUBLISHERS,
    ),
    "dino_training": Format(
        "DINO's training, student or teacher",
        lambda n, w: _is_plain(n) and w[-1:] in (("student",), ("teacher",)),
        plain,
        _GELU_6,
        statistics=IMAGENET,
        models="dino_",
        resize_margin=_DINO_MARGIN,
    ),
    "dino": Format(
        "DINO, for which any ViT of these names without a head is taken",
        lambda n, w: _is_plain(n),
        plain,
        _GELU_6,
        trained_with=_PUBLISHERS,
        models="dino_",
        resize_margin=_DINO_MARGIN,
    ),
}

# --- what files and configurations show of the model ---

# Published models of these widths have so many heads, whoever trained them: a guess, for where no
# table, configuration or user says.
KNOWN_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
# Relations of CLS in a table: CLS to any token, any token to CLS, CLS to itself.
_CLASS_TOKEN_ROWS = 3
_CLIP_HEAD_WIDTH = 64
_HF_TYPES = (
    "clip",
    "clip_vision_model",
    "vit",
    "vit_mae",
    "vit_msn",
    "deit",
    "beit",
)


def recognise(shapes: Shapes, file: TensorFile) -> Architecture:
    """Returns what tensors show: all but activation, eps, and heads where there is no table."""
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    tokens = [name in shapes for name in ("cls_token", "dist_token")]
    table = shapes.get("rel_pos_bias.relative_position_bias_table")
    own_table = shapes.get("blocks.0.attn.relative_position_bias_table")
    grid = 0
    if "pos_embed" in shapes:
        grid = side_of(shapes["pos_embed"][1] - sum(tokens))
    elif table or own_table:
        grid = grid_of((table or own_table)[0] - _CLASS_TOKEN_ROWS * tokens[0])
    heads = (table or own_table or (0, 0))[1]
    return Architecture(
        family="vit",
        embed_dim=width,
        depths=(count_of(shapes, r"blocks\.(\d+)\."),),
        num_heads=(heads,) if heads else None,
        patch_size=patch,
        image_size=grid * patch or None,
        mlp_ratio=mlp_ratio(shapes, "blocks.0.mlp.fc1.weight", width),
        qkv_bias=qkv_bias(shapes, "blocks.0.attn."),
        patch_bias="patch_embed.proj.bias" in shapes,
        absolute_position="pos_embed" in shapes,
        class_token=tokens[0],
        distillation_token=tokens[1],
        relative_position="shared" if table else "block" if own_table else "none",
        layer_scale=0.0 if "blocks.0.gamma_1" not in shapes else 0.1,
        pre_norm_layer="norm_pre.weight" in shapes,
    )


_BEYOND = (
    (r"(^|\.)(reg_token|register_tokens|storage_tokens)$", "register tokens"),
    (r"layer_scale1\.lambda1$", "DINOv2's or DINOv3's names, which a config.json has to explain"),
    (r"\.(q_norm|k_norm|attn\.norm|mlp\.norm)\.", "norms inside attention or MLP"),
    (r"\.mlp\.(w12|fc1_g|w1|gate_proj)\.", "a gated MLP"),
    (r"\.attn\.rel_pos\.|\.rope\.|(^|\.)freqs$", "positions of another kind"),
    (r"^attn_pool\.", "attention pooling, as SigLIP has it, with an activation of its own"),
    (r"^patch_embed\.backbone\.", "a convolutional stem"),
    (r"^blocks\.\d+\.\d+\.", "parallel blocks"),
)


def _beyond(shapes: Shapes) -> str:
    """Says what a file of others holds that no ViT here has; "" if there is nothing."""
    for pattern, what in _BEYOND:
        if any(re.search(pattern, name) for name in shapes):
            return what
    if "blocks.0.norm1.weight" in shapes and "blocks.0.norm1.bias" not in shapes:
        return "norms without bias"
    has_tables = any(name.endswith("relative_position_bias_table") for name in shapes)
    if has_tables or "patch_embed.proj.weight" not in shapes:
        return ""
    if "pos_embed" not in shapes:
        return "no positions at all: rotary ones leave no tensor"
    prefix = sum(name in shapes for name in ("cls_token", "dist_token"))
    if not prefix:
        return (
            "no class token: SigLIP's with another GELU and timm's with norms after the branches "
            "have the same names"
        )
    count = shapes["pos_embed"][1] if len(shapes["pos_embed"]) == 3 else 0
    if side_of(count) and not side_of(count - prefix):
        return (
            "positions without one for the class token, as in DeiT III, FlexiViT and some models "
            "with rotary positions, which no name tells apart"
        )
    return ""


def _guess(found: Architecture) -> Architecture:
    heads = KNOWN_HEADS.get(found.embed_dim)
    return Architecture(num_heads=(heads,)) if heads else Architecture()


def _hugging_face(config: dict[str, Any], where: str) -> Architecture | None:
    """Reads a `config.json` of transformers."""
    if config.get("model_type") not in _HF_TYPES:
        return None
    config = config.get("vision_config", config)
    heads = config.get("num_attention_heads")
    return Architecture(
        norm_eps=config.get("layer_norm_eps"),
        image_size=config.get("image_size"),
        activation=activation_named(config.get("hidden_act"), where, of="hidden_act"),
        num_heads=(heads,) if heads else None,
    )


def _open_clip(config: dict[str, Any], where: str) -> Architecture:
    """Reads a model configuration of open_clip."""
    vision = config.get("vision_cfg", {})
    options = [name for name in ("act_kwargs", "norm_kwargs") if vision.get(name)]
    if options:
        raise WeightsError(
            f"{where}: options of layers that no model here has; got {', '.join(options)} of "
            "vision_cfg in its configuration, expected none. Give it as a function of your own, "
            "--teacher.source module:FILE.py:NAME, that builds it with open_clip."
        )
    width = vision.get("width")
    return Architecture(
        num_heads=(width // vision.get("head_width", _CLIP_HEAD_WIDTH),) if width else None,
        image_size=vision.get("image_size"),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        norm_eps=1e-5,
    )


def _timm(net: Any, where: str) -> Architecture | None:
    """Reads a ViT or BEiT of timm, a module; None for one that computes anything else than ours."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models import beit, vision_transformer
    from timm.models.deit import VisionTransformerDistilled

    plain = (vision_transformer.VisionTransformer, VisionTransformerDistilled)
    if type(net) not in (*plain, beit.Beit) or type(net.patch_embed) is not PatchEmbed:
        return None
    if type(net) in plain and (
        net.reg_token is not None
        or net.attn_pool is not None
        or (net.no_embed_class and net.has_class_token)
        or net.pos_embed is None
    ):
        return None
    blocks = (vision_transformer.Block, beit.Block)
    attentions = (vision_transformer.Attention, Attention, beit.Attention)
    for block in net.blocks:
        parts = (getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm"))
        if (
            type(block) not in blocks
            or type(block.attn) not in attentions
            or type(block.mlp) is not Mlp
            or not all(part is None or isinstance(part, nn.Identity) for part in parts)
            or not isinstance(block.mlp.norm, nn.Identity)
            or not isinstance(block.norm1, nn.LayerNorm)
            or block.norm1.bias is None
        ):
            return None
    activation = net.blocks[0].mlp.act
    kind = type(activation).__name__
    if kind not in ("GELU", "QuickGELU") or getattr(activation, "approximate", "none") != "none":
        return None
    block = net.blocks[0]
    return Architecture(
        num_heads=(block.attn.num_heads,),
        activation=activation_named(kind, where, of="timm's"),
        norm_eps=block.norm1.eps,
        image_size=net.patch_embed.img_size[0],
    )


# --- from a file to a model that differs from it ---

# timm's and Hugging Face's names of a norm that follows the mean of the tokens.
_OF_THE_MEAN = re.compile(r"(^|\.)(fc_norm|pooler\.layernorm)\.weight$")


def shared_bias(name: str) -> str:
    """Returns the name of the bias that blocks share, for that of a block's own."""
    return re.sub(r"^blocks\.\d+\.attn\.(?=relative_position)", "rel_pos_bias.", name)


def _adapt(pieces: Pieces, wanted: Wanted) -> tuple[Pieces, list[str]]:
    notes = []
    if copies := expanded(pieces, wanted.shapes, shared_bias):
        pieces = copies
        notes.append("the shared position bias is copied to every block")
    if "norm.weight" not in pieces and any(_OF_THE_MEAN.search(n) for n in wanted.dropped):
        pieces = pieces | fresh_norm(wanted.architecture.embed_dim)
        notes.append(
            "the file has no norm for tokens, only one for their mean: a norm that only normalises"
        )
    if wanted.found.distillation_token:
        kept = wanted.architecture.keep_distillation_token
        notes.append(
            f"the distillation token is {'kept in' if kept else 'dropped from'} the feature map"
        )
    return pieces, notes


_CLIP_FACTS = WeightFacts(OPENAI_CLIP, 224, "MIT", "github.com/openai/CLIP")
_DINO = WeightFacts(IMAGENET, 224, "Apache-2.0", "github.com/facebookresearch/dino")
_DEIT = WeightFacts(IMAGENET, 224, "Apache-2.0", "github.com/facebookresearch/deit")

PUBLISHED = Published(
    formats=FORMATS,
    recognise=recognise,
    configs={"hf": _hugging_face, "open_clip": _open_clip, "timm": _timm},
    adapt=_adapt,
    beyond=_beyond,
    guess=_guess,
    ours={"keep_distillation_token": False},
    agree={
        # Its value is in the weights.
        "layer_scale": lambda fact, wanted, depths: bool(fact) == bool(wanted),
        # What is shared can be copied to every block.
        "relative_position": lambda fact, wanted, depths: (
            fact == wanted or (fact, wanted) == ("shared", "block")
        ),
    },
    without_shape=lambda known: {
        "norm_eps": 1e-6,
        "activation": "gelu",
        "keep_distillation_token": False,
        "num_heads": (1,),
        **size_to_compare(known),
    },
    facts={
        "clip_vit_base_patch16": _CLIP_FACTS,
        "clip_vit_large_patch14": _CLIP_FACTS,
        "dino_vit_base_patch16": _DINO,
        "deit_vit_base_patch16": _DEIT,
        "deit_distilled_vit_base_patch16": _DEIT,
    },
)
