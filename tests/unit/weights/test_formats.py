from __future__ import annotations

import pytest
import torch
from translated_names import translate

from fd_large.backbones.published import Wanted
from fd_large.backbones.registry import FAMILIES
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.published import shared_bias as of_swinv2
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.translation import Piece, expanded, translated
from fd_large.backbones.vit.published import shared_bias as of_vit
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.coverage import covered
from fd_large.weights.formats import FORMATS, detect


def swinv2(**options):
    return SwinV2(8, (2, 2), (1, 2), window_size=4, patch_size=2, **options)


def swin(stages=4):
    depths, heads = (1,) * stages, (1, 1, 2, 2)[:stages]
    return Swin(8, depths, heads, window_size=2, patch_size=2, image_size=32)


def vit(**options):
    return ViT(8, 2, 2, patch_size=4, image_size=16, **options)


STUDENT = {
    "absolute_position": False,
    "relative_position": "shared",
    "layer_scale": 0.1,
    "qkv_bias": "qv",
}


def renamed(net, pairs):
    """A net's state under published names."""
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state


def check(net, state, form, wrapping=()):
    """The state is told as `form`, and translated it is exactly the net's own."""
    assert detect(state, wrapping=wrapping) == form
    own = {name for name in state if not name.startswith("feature_model.")}
    alike = [known.family for known in FORMATS.values() if known.format.is_it(own, wrapping)]
    assert all(family is FORMATS[form].family for family in alike)
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    found = dict(covered(expected, translate(form, state.items()), where="test"))
    for name, parameter in net.named_parameters():
        assert torch.equal(found[name], parameter), name


FD_SWIN = [
    (".cpb_mlp.", ".rpe_mlp."),
    (".position_bias.", ".rel_pos_bias."),
    (".extra_norm.", ".enorm."),
]


@pytest.mark.parametrize("shared", [False, True])
def test_fd_swinv2_student_without_its_teacher(shared):
    net = swinv2(extra_norm_every=2, shared_position_bias=shared)
    state = {f"encoder.{n}": t for n, t in renamed(net, FD_SWIN).items()}
    state |= {
        "encoder.layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(1),
        "feature_model.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(1),
    }
    check(net, state, "fd_swinv2")


def test_fd_vit_student():
    net = vit(**STUDENT)
    state = {f"encoder.{n}": t for n, t in net.state_dict().items()}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(1)
    state["feature_model.cls_token"] = torch.zeros(1)
    check(net, state, "fd_vit")


def test_pre_training_of_beit_is_no_student():
    """Its statistics are not the students'; nothing in the file tells them."""
    net = vit(**STUDENT)
    state = {**net.state_dict(), "mask_token": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    check(net, state, "beit_pretraining")
    assert FORMATS["beit_pretraining"].format.statistics is None


def test_fd_projection_becomes_a_linear_layer():
    items = [("decoder.0.weight", torch.ones(6, 4, 1)), ("decoder.0.bias", torch.zeros(6))]
    for form in ("fd_swinv2", "fd_vit"):
        got = dict(translate(form, items))
        assert got["projection.weight"].shape == (6, 4)
        assert got["projection.bias"].shape == (6,)


def test_official_swinv2_and_our_own_files():
    net = swinv2()
    state = net.state_dict() | {
        "head.weight": torch.zeros(10, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    check(net, state, "swinv2")
    own = swinv2(extra_norm_every=1, shared_position_bias=True)
    check(own, own.state_dict(), "swinv2")


@pytest.mark.parametrize("cpb", [".cpb_mlp.", ".rpe_mlp."])
def test_simmim_swinv2(cpb):
    net = swinv2()
    state = {f"encoder.{n}": t for n, t in renamed(net, [(".cpb_mlp.", cpb)]).items()}
    state |= {"encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1, 1, 1, 1)}
    check(net, state, "simmim_swinv2")


def test_esvit_with_its_heads_and_swin_without():
    net = swin()
    state = net.state_dict() | {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
    }
    check(net, state | {"head.weight": torch.zeros(3, 8)}, "swin")
    check(net, state, "esvit", wrapping=("student",))
    heads = {"head.mlp.0.weight": torch.zeros(1), "head_dense.last_layer.weight_g": torch.zeros(1)}
    check(net, state | heads, "esvit")


def test_first_stages_end_with_a_norm_that_only_normalises():
    whole, target = swin(), swin(stages=3)
    state = whole.state_dict()
    pieces = translated(state, FORMATS["swin"].format.rule).pieces
    three = resolve("swin_base_esvit_s3", Architecture(embed_dim=8, num_heads=(1, 1, 2)))
    wanted = Wanted(three, {}, Architecture(depths=(1, 1, 1, 1)), [])
    pieces, _ = FAMILIES["swin"].published.adapt(pieces, wanted)
    found = {name: piece.read(state) for name, piece in pieces.items()}
    target.load_state_dict(found)
    assert (found["norm.weight"] == 1).all()
    assert (found["norm.bias"] == 0).all()


def test_a_shared_bias_is_copied_to_every_block():
    shared, own = swinv2(shared_position_bias=True), swinv2()
    expected = {name: tuple(p.shape) for name, p in own.named_parameters()}
    state = shared.state_dict()
    pieces = expanded({name: Piece((name,)) for name in state}, expected, of_swinv2)
    assert pieces.keys() == expected.keys()
    table = "layers.1.position_bias.cpb_mlp.2.weight"
    assert pieces["layers.1.blocks.1.attn.cpb_mlp.2.weight"].sources == (table,)
    block = vit(**{**STUDENT, "relative_position": "block"})
    expected = {name: tuple(p.shape) for name, p in block.named_parameters()}
    pieces = {name: Piece((name,)) for name in vit(**STUDENT).state_dict()}
    assert expanded(pieces, expected, of_vit).keys() == expected.keys()
    same = {name: tuple(t.shape) for name, t in state.items()}
    pieces = {name: Piece((name,)) for name in state}
    assert expanded(pieces, same, of_swinv2) is None


CLIP_NAMES = [
    ("blocks.", "transformer.resblocks."),
    ("norm_pre.", "ln_pre."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.weight", ".attn.in_proj_weight"),
    (".attn.qkv.bias", ".attn.in_proj_bias"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("patch_embed.proj.", "conv1."),
]


@pytest.mark.parametrize("openai", [True, False])
def test_clip_without_its_text_tower(openai):
    net = vit(pre_norm_layer=True, patch_bias=False, activation="quick_gelu")
    state = {}
    for name, tensor in renamed(net, CLIP_NAMES).items():
        if name == "cls_token":
            name, tensor = "class_embedding", tensor[0, 0]
        elif name == "pos_embed":
            name, tensor = "positional_embedding", tensor[0]
        elif name.startswith("norm."):
            name = f"ln_post.{name.removeprefix('norm.')}"
        state[f"visual.{name}"] = tensor
    state |= {
        "visual.proj": torch.zeros(8, 4),
        "positional_embedding": torch.zeros(1),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(1),
        "logit_scale": torch.zeros(()),
    }
    if openai:
        state["input_resolution"] = torch.tensor(16)
    check(net, state, "openai_clip" if openai else "open_clip")


@pytest.mark.parametrize("distilled", [False, True])
def test_dino_deit_and_timm_differ_in_wrapping_and_heads(distilled):
    net = vit(distillation_token=distilled)
    heads = {"head.weight": torch.zeros(2, 8), "head.bias": torch.zeros(2)}
    check(net, net.state_dict(), "deit" if distilled else "dino")
    check(net, net.state_dict() | heads, "deit" if distilled else "timm_vit")
    heads |= {"head_dist.weight": torch.zeros(2, 8)}
    check(net, net.state_dict() | heads, "deit", wrapping=("model",))


def test_beit_and_fine_tuned_fd_vits():
    net = vit(**{**STUDENT, "relative_position": "block"})
    state = net.state_dict() | {"fc_norm.weight": torch.zeros(8), "head.bias": torch.zeros(3)}
    check(net, state, "beit")


def test_unknown_names_list_the_known_formats():
    with pytest.raises(WeightsError, match="OpenAI CLIP") as caught:
        detect(["a.weight"])
    assert "a.weight" in str(caught.value)
    assert "--" not in str(caught.value)
    with pytest.raises(
        WeightsError, match=r"--teachers\.a\.model timm:.* --teachers\.a\.source mod"
    ):
        detect(["a.weight"], where="--teachers.a.source")
    with pytest.raises(WeightsError, match=r"--student\.model timm:.* --student\.model module:"):
        detect(["a.weight"], where="--student.init")
    with pytest.raises(WeightsError, match="no known format"):
        detect(["visual.conv1.weight", "visual.layer1.0.conv1.weight"])  # A CLIP's ResNet.


def test_a_resnet_of_a_clip_is_sent_to_timm():
    names = ["visual.conv1.weight", "visual.attnpool.positional_embedding", "input_resolution"]
    with pytest.raises(WeightsError, match=r"--teacher\.source timm:resnet50_clip"):
        detect(names)
