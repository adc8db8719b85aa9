from __future__ import annotations

import pytest
import torch

from fd_large.errors import WeightsError
from fd_large.models.registry import build
from fd_large.models.swin import Swin
from fd_large.models.swinv2 import SwinV2
from fd_large.models.vit import ViT
from fd_large.recipes.architectures import Architecture
from fd_large.weights.formats import FORMATS, covered, detect, read_weights, translate
from fd_large.weights.swin import first_stages


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


def check(net, state, form):
    """The state is told as `form`, and translated it is exactly the net's own."""
    assert detect(state) == form
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


@pytest.mark.parametrize("teacher", ["visual.conv1.weight", "layers.0.norm.weight", "cls_token"])
def test_fd_vit_student_without_its_teacher(teacher):
    net = vit(**STUDENT)
    state = {f"encoder.{n}": t for n, t in net.state_dict().items()}
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(1)
    state[f"feature_model.{teacher}"] = torch.zeros(1)
    check(net, state, "fd_vit")


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


def test_esvit_with_its_heads():
    net = swin()
    state = net.state_dict() | {
        "head.mlp.0.weight": torch.zeros(1),
        "head_dense.last_layer.weight_g": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
    }
    check(net, state, "swin")


def test_first_stages_end_with_a_norm_that_only_normalises():
    whole, target = swin(), swin(stages=3)
    items = translate("swin", whole.state_dict().items())
    expected = {name: tuple(p.shape) for name, p in target.named_parameters()}
    found = dict(covered(expected, first_stages(items, 3), where="test"))
    assert (found["norm.weight"] == 1).all()
    assert (found["norm.bias"] == 0).all()


def test_openai_clip_without_its_text_tower():
    net = vit(pre_norm_layer=True, patch_bias=False, activation="quick_gelu")
    state = {}
    for name, tensor in renamed(
        net,
        [
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
        ],
    ).items():
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
        "input_resolution": torch.tensor(16),
        "logit_scale": torch.zeros(()),
    }
    check(net, state, "openai_clip")


@pytest.mark.parametrize("distilled", [False, True])
def test_dino_and_deit_without_heads(distilled):
    net = vit(distillation_token=distilled)
    check(net, net.state_dict(), "vit")
    heads = {"head.weight": torch.zeros(2, 8), "head_dist.bias": torch.zeros(2)}
    check(net, net.state_dict() | heads, "vit")


@pytest.mark.parametrize(
    "names",
    [
        ["a.weight"],
        ["encoder.mask_token", "encoder.layers.0.blocks.0.attn.rpe_mlp.0.weight"],
        ["layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.1.downsample.norm.weight"],
    ],
)
def test_unknown_names_list_the_known_formats(names):
    with pytest.raises(WeightsError, match="OpenAI CLIP") as caught:
        detect(names)
    assert names[0] in str(caught.value)


def test_unknown_format_gives_the_nearest():
    with pytest.raises(WeightsError, match="nearest: swinv2"):
        list(translate("swinv3", []))
    assert "swinv2" in FORMATS


def test_the_report_names_everything_that_does_not_fit():
    expected = {"a": (2,), "b": (3,), "c": (1, 2)}
    items = [("b", torch.zeros(4)), ("c", torch.zeros(1, 2)), ("d", torch.zeros(1))]
    with pytest.raises(WeightsError) as caught:
        dict(covered(expected, [*items, ("c", torch.zeros(1, 2))], where="test"))
    message = str(caught.value)
    for piece in ("missing: a", "left over: d", "b (4,) for (3,)", "given twice: c"):
        assert piece in message


def test_read_weights_takes_a_file_all_the_way(tmp_path):
    net = build(
        "vit_base_patch16",
        Architecture(embed_dim=8, depths=(1,), num_heads=(2,), patch_size=4, image_size=16),
    )
    state = {f"encoder.{n}": t for n, t in net.state_dict().items()}
    state |= {"decoder.0.weight": torch.zeros(6, 8, 1), "decoder.0.bias": torch.zeros(6)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "fd.pth")
    found = dict(read_weights(tmp_path / "fd.pth"))
    assert found.keys() == net.state_dict().keys()
