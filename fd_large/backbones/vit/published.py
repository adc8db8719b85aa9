"""Published weights of vision transformers: names, formats, and facts of their models."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fd_large.backbones.published import (
    Format,
    Published,
    TargetModel,
    TensorFile,
    WeightFacts,
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
    COMPUTED,
    FEATURE_DISTILLATION,
    Pieces,
    Shapes,
    expanded,
    fresh_norm,
    table,
    under,
)
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture

TEXT_PROJECTIONS = {"visual.proj": True, "visual_projection.weight": False}
"""{name: whether it is stored transposed, (width, embedding)} of the projection of CLIP's class
token into the texts' embedding space, as OpenAI and open_clip name it, and as transformers does."""

# --- tables of names; what no row has keeps its name ---

# OpenAI's and open_clip's: the text tower is left out.
_CLIP = table("""
visual.transformer.resblocks.#.     blocks.#.
    ln_#.*                          norm#.*
    ls_#.gamma                      gamma_#
    attn.in_proj_*                  attn.qkv.*
    attn.out_proj.*                 attn.proj.*
    mlp.c_fc.*                      mlp.fc1.*
    mlp.c_proj.*                    mlp.fc2.*
    *                               *
visual.proj                         -
visual.class_embedding              cls_token               token
visual.positional_embedding         pos_embed               batched
visual.conv1.*                      patch_embed.proj.*
visual.ln_pre.*                     norm_pre.*
visual.ln_post.*                    norm.*
visual.*                            *
*                                   -
""")
_HF_CLIP = table(
    """
{text_model|text_projection|visual_projection|classifier}.*     -
logit_scale*                                                    -
*position_ids                                                   -
embeddings.class_embedding                  cls_token           token
embeddings.position_embedding.weight        pos_embed           batched
embeddings.patch_embedding.*                patch_embed.proj.*
pre_layrnorm.*                              norm_pre.*
post_layernorm.*                            norm.*
encoder.layers.#.                           blocks.#.
    layer_norm#.*                           norm#.*
    self_attn.q_proj.*                      attn.qkv.*          q
    self_attn.k_proj.*                      attn.qkv.*          k
    self_attn.v_proj.*                      attn.qkv.*          v
    self_attn.out_proj.*                    attn.proj.*
    *                                       *
*                                           *
""",
    start="{|vision_model.}",
)
# Names that transformers stored up to version 4 and stores still; then those of 5 in memory.
_HF = """
{classifier|cls_classifier|distillation_classifier|pooler|decoder|lm_head}.*    -
embeddings.mask_token                                       -
embeddings.cls_token                                        cls_token
embeddings.distillation_token                               dist_token
embeddings.position_embeddings                              pos_embed
embeddings.patch_embeddings.projection.*                    patch_embed.proj.*
{encoder.relative_position_bias|shared_position_bias}.*     rel_pos_bias.*
layernorm.*                                                 norm.*
{encoder.layer|layers}.#.                                   blocks.#.
    layernorm_before.*                                      norm1.*
    layernorm_after.*                                       norm2.*
    attention.{attention.query|q_proj}.*                    attn.qkv.*      q
    attention.{attention.key|k_proj}.*                      attn.qkv.*      k
    attention.{attention.value|v_proj}.*                    attn.qkv.*      v
    attention.{output.dense|o_proj}.*                       attn.proj.*
    {intermediate.dense|mlp.fc1}.*                          mlp.fc1.*
    {output.dense|mlp.fc2}.*                                mlp.fc2.*
    *                                                       *
*                                                           *
"""
HF_VIT = table(_HF, start="{|vit.|deit.}")
# A norm for the mean of the tokens is its pooler's, and left out.
_HF_BEIT = """
{encoder.layer|layers}.#.                                       blocks.#.
    {attention.attention.|}relative_position_bias.relative_*    attn.relative_*
    attention.{attention.query|q_proj}.bias                     attn.q_bias
    attention.{attention.key|k_proj}.bias                       attn.k_bias
    attention.{attention.value|v_proj}.bias                     attn.v_bias
    lambda_#                                                    gamma_#
"""
HF_BEIT = table(COMPUTED + _HF_BEIT + _HF, start="{|beit.}")
# DINO, DeiT and timm share our names. Left out are heads, also a head's own norm, and what iBOT's
# student puts in the place of masked patches.
TIMM_VIT = table("""
{head|head_dist|fc_norm}.*  -
masked_embed*               -
blocks.#.ls#.gamma          blocks.#.gamma_#
*                           *
""")
_OPEN_CLIP_TRUNK = under("visual.trunk.", TIMM_VIT) + table("* -")
_OF_DINOV2 = """
mask_token          -
register_tokens     reg_token
"""
_DINOV2 = table(_OF_DINOV2) + TIMM_VIT
# An encoder of DINOv2's code, whose blocks are one chunk, beside its projectors.
_OF_UNIC = """
lp.*                            -
encoder.blocks.0.#.ls#.gamma    blocks.#.gamma_#
encoder.blocks.0.*              blocks.*
"""
_UNIC = table(_OF_UNIC) + under("encoder.", _DINOV2)
# Feature-Distillation's students, with their projection and beside their teacher, and BEiT.
_OF_STUDENT = """
mask_token                                  -
{feature_model|head|fc_norm|lm_head}.*      -
"""
_STUDENT = table(COMPUTED + _OF_STUDENT, start="{encoder.|}") + FEATURE_DISTILLATION
_OF_MMSEG = """
patch_embed.projection.*            patch_embed.proj.*
{norm|ln1}.*                        norm.*
layers.#.                           blocks.#.
    ln#.*                           norm#.*
    ffn.layers.0.0.*                mlp.fc1.*
    ffn.layers.1.*                  mlp.fc2.*
    attn.{qkv.|attn.in_proj_}*      attn.qkv.*
    attn.{|attn.out_}proj.*         attn.proj.*
    *                               *
"""
MMSEG = table(COMPUTED + _OF_MMSEG)


# --- formats ---


_PLAIN = (r"^blocks\.0\.attn\.qkv\.weight$", r"^patch_embed\.proj\.weight$")
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
        (r"^visual\.attnpool\.",),
        _CLIP,
        refusal="timm has these models with their weights: --teacher.source timm:resnet50_clip, "
        "timm:resnet101_clip, timm:resnet50x4_clip, timm:resnet50x16_clip, timm:resnet50x64_clip.",
    ),
    "openai_clip": Format(
        "OpenAI CLIP's image tower",
        (r"^visual\.class_embedding$", r"^input_resolution$"),
        _CLIP,
        Architecture(norm_eps=1e-5, activation="quick_gelu"),
        statistics=OPENAI_CLIP,
        models="clip_",
    ),
    "open_clip_timm": Format(
        "open_clip with an image tower of timm",
        (r"^visual\.trunk\.blocks\.0\.attn\.qkv\.weight$",),
        _OPEN_CLIP_TRUNK,
        ask=_ASK,
        library="open_clip",
    ),
    "open_clip": Format(
        "open_clip's image tower",
        (r"^visual\.class_embedding$",),
        _CLIP,
        _EPS_5,
        ask=("activation",),
        trained_with=_CLIPS,
        library="open_clip",
    ),
    "hf_clip": Format(
        "Hugging Face CLIP",
        (r"embeddings\.class_embedding",),
        _HF_CLIP,
        ask=_ASK,
        statistics=OPENAI_CLIP,
        library="hf",
    ),
    "hf_beit": Format(
        "Hugging Face BEiT",
        (r"embeddings\.cls_token", r"\.lambda_1|\.relative_position_bias_table"),
        HF_BEIT,
        ask=_ASK,
        library="hf",
    ),
    "hf_vit": Format(
        "Hugging Face ViT or DeiT",
        (r"embeddings\.cls_token", r"embeddings\.patch_embeddings\."),
        HF_VIT,
        ask=_ASK,
        library="hf",
    ),
    "mmseg_vit": Format(
        "mmsegmentation's BEiT, MAE or VisionTransformer",
        (r"^layers\.0\.ln1\.weight$", r"^patch_embed\.projection\.weight$"),
        MMSEG,
        _GELU_6,
        trained_with=_BEITS,
    ),
    "dinov2_registers": Format(
        "DINOv2 with registers",
        (*_PLAIN, "^register_tokens$"),
        _DINOV2,
        _GELU_6,
        statistics=IMAGENET,
        resize_antialias=True,
    ),
    "dinov2": Format(
        "DINOv2",
        (*_PLAIN, "^mask_token$", r"^blocks\.0\.ls1\.gamma$"),
        _DINOV2,
        _GELU_6,
        statistics=IMAGENET,
        resize_margin=_DINO_MARGIN,
    ),
    "unic": Format(
        "UNIC's student",
        (r"^encoder\.blocks\.0\.0\.attn\.qkv\.weight$",),
        _UNIC,
        _GELU_6,
        statistics=IMAGENET,
        resize_margin=_DINO_MARGIN,
    ),
    # Shares a bias among its blocks, as Feature-Distillation's students do.
    "beit_pretraining": Format(
        "BEiT's masked pre-training",
        (r"^lm_head\.weight$", r"^rel_pos_bias\."),
        _STUDENT,
        _GELU_6,
    ),
    "fd_vit": Format(
        "Feature-Distillation ViT student",
        (r"^encoder\.blocks\.|^rel_pos_bias\.",),
        _STUDENT,
        _GELU_6,
        statistics=IMAGENET,
    ),
    "beit": Format(
        "BEiT (timm's or its own), or a fine-tuned Feature-Distillation ViT",
        (r"^blocks\.0\.attn\.q_bias$",),
        _STUDENT,
        _GELU_6,
        trained_with=_BEITS,
    ),
    "deit": Format(
        "DeiT",
        (*_PLAIN, "^dist_token$|^in model$", r"^dist_token$|^head\.bias$"),
        TIMM_VIT,
        _GELU_6,
        statistics=IMAGENET,
        models="deit_",
    ),
    "timm_clip": Format(
        "timm's ViT of a CLIP",
        (*_PLAIN, r"^norm_pre\."),
        TIMM_VIT,
        _EPS_5,
        ask=("activation",),
        trained_with=_CLIPS,
    ),
    "timm_vit": Format(
        "timm's ViT",
        (*_PLAIN, r"^head\.|^fc_norm\.", "^in $"),
        TIMM_VIT,
        _GELU_6,
        trained_with=_PUBLISHERS,
    ),
    "dino_training": Format(
        "DINO's training, student or teacher",
        (*_PLAIN, r"^in (.*\.)?(student|teacher)$"),
        TIMM_VIT,
        _GELU_6,
        statistics=IMAGENET,
        models="dino_",
        resize_margin=_DINO_MARGIN,
    ),
    "dino": Format(
        "DINO, for which any ViT of these names without a head is taken",
        _PLAIN,
        TIMM_VIT,
        _GELU_6,
        trained_with=_PUBLISHERS,
        models="dino_",
        resize_margin=_DINO_MARGIN,
    ),
}

# --- what files and configurations show of the model ---

# {width: number of heads} of published models, whoever trained them: a guess for models whose heads
# neither a table, a configuration nor the user shows.
KNOWN_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
# Relations of prefix tokens in a table: to a patch, of a patch to them, among themselves.
_PREFIX_ROWS = 3
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
    """Returns the architecture fields that a file's tensors show.

    No tensor shows `activation` or `norm_eps`. Only a table of relative positions shows the number
    of heads.

    Args:
        shapes: Shapes of the file's tensors, by our names.
        file: The file; not used.
    """
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    tokens = [name in shapes for name in ("cls_token", "dist_token")]
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    with_position = True
    table = shapes.get("rel_pos_bias.relative_position_bias_table")
    own_table = shapes.get("blocks.0.attn.relative_position_bias_table")
    grid = 0
    if "pos_embed" in shapes:
        positions = shapes["pos_embed"][1]
        with_position = not tokens[0] or side_of(positions - sum(tokens)) > 0
        grid = side_of(positions - sum(tokens) if with_position else positions)
    elif table or own_table:
        has_prefix = tokens[0] or registers > 0
        grid = grid_of((table or own_table)[0] - _PREFIX_ROWS * has_prefix)
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
        class_position=with_position,
        num_registers=registers,
    )


_BEYOND = (
    (r"(^|\.)storage_tokens$", "register tokens as DINOv3 has them, beside rotary positions"),
    (r"layer_scale1\.lambda1$", "DINOv2's or DINOv3's names, which a config.json has to explain"),
    (r"\.(q_norm|k_norm|attn\.norm|mlp\.norm)\.", "norms inside attention or MLP"),
    (r"\.mlp\.(w12|fc1_g|w1|gate_proj)\.", "a gated MLP"),
    (r"\.attn\.rel_pos\.|\.rope\.|(^|\.)freqs$", "positions of another kind"),
    (r"^attn_pool\.", "attention pooling, as SigLIP has it, with an activation of its own"),
    (r"^patch_embed\.backbone\.", "a convolutional stem"),
    (r"^blocks\.\d+\.\d+\.", "parallel blocks"),
)


def _beyond(shapes: Shapes) -> str:
    """Returns, in words, a part of the file that no ViT model here has, or "" if there is none.

    Args:
        shapes: {our name: shape} of the file's tensors.
    """
    for pattern, label in _BEYOND:
        if any(re.search(pattern, name) for name in shapes):
            return label
    if "blocks.0.norm1.weight" in shapes and "blocks.0.norm1.bias" not in shapes:
        return "norms without bias"
    has_tables = any(name.endswith("relative_position_bias_table") for name in shapes)
    if has_tables or "patch_embed.proj.weight" not in shapes:
        return ""
    if "pos_embed" not in shapes:
        return "no positions at all (rotary positions leave no tensor)"
    prefix = sum(name in shapes for name in ("cls_token", "dist_token"))
    if not prefix:
        return (
            "no class token: SigLIP's ViTs with another GELU, and timm's with norms after the "
            "branches, have the same names"
        )
    count = shapes["pos_embed"][1] if len(shapes["pos_embed"]) == 3 else 0
    if "reg_token" in shapes and not side_of(count) and not side_of(count - prefix):
        return "positions of its register tokens"
    if "reg_token" not in shapes and side_of(count) and not side_of(count - prefix):
        return (
            "no position for the class token, as in DeiT III, FlexiViT and some models with "
            "rotary positions, which have the same names"
        )
    return ""


def _guess(architecture: Architecture) -> Architecture:
    heads = KNOWN_HEADS.get(architecture.embed_dim)
    return Architecture(num_heads=(heads,)) if heads else Architecture()


def _hugging_face(config: dict[str, Any], where: str) -> Architecture | None:
    """Returns the architecture fields that `config`, the contents of a config.json, states.

    Returns None if the file does not describe a ViT of transformers that can be read here.

    Raises: WeightsError: for an unsupported activation; the message begins with `where`.
    """
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
    """Returns the architecture fields that `config`, a model configuration of open_clip, states.

    Raises:
        WeightsError: If the configuration has options of layers that are not supported. The message
            begins with `where`.
    """
    vision = config.get("vision_cfg", {})
    options = [name for name in ("act_kwargs", "norm_kwargs") if vision.get(name)]
    if options:
        raise WeightsError(
            f"{where}: options of unsupported layers; got {', '.join(options)} of "
            "vision_cfg in its configuration, expected none. Write a function of your own, "
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
    """Returns the architecture fields of `net`, a ViT or BEiT module of timm.

    Returns None if the module computes something else than our ViT, or is another model.
    """
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
    """Returns the name of the table of relative positions that all blocks share.

    Args:
        name: Name of the table of a block. The name of any other tensor is returned unchanged.
    """
    return re.sub(r"^blocks\.\d+\.attn\.(?=relative_position)", "rel_pos_bias.", name)


def _adapt(pieces: Pieces, target: TargetModel) -> tuple[Pieces, list[str]]:
    pieces, notes = expanded(pieces, target.shapes, shared_bias)
    if "norm.weight" not in pieces and any(_OF_THE_MEAN.search(n) for n in target.dropped):
        pieces = pieces | fresh_norm(target.architecture.embed_dim)
        notes.append(
            "the file has no norm for tokens, only one for their mean: the final norm has weight "
            "1 and bias 0"
        )
    if target.found.distillation_token:
        is_kept = target.architecture.keep_distillation_token
        notes.append(
            f"the distillation token is {'kept in' if is_kept else 'dropped from'} the feature map"
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
        "layer_scale": lambda fact, requested, depths: bool(fact) == bool(requested),
        # What is shared can be copied to every block.
        "relative_position": lambda fact, requested, depths: (
            fact == requested or (fact, requested) == ("shared", "block")
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
