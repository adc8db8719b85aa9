"""Our weights in the models of timm: the same features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loading import (
    IMAGES,
    TIMM_SWIN,
    TIMM_VIT,
    TINY,
    TINY_SWIN,
    TINY_VIT,
    close,
    scattered,
    tokens,
)
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from fd_large.backbones.registry import build, family_of
from fd_large.backbones.translation import translated
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import resolve
from fd_large.weights.convert import write
from fd_large.weights.published import FORMATS, detect


def ours(name, fields):
    net = scattered(build(name, fields, initialization="official", seed=0))
    return net, resolve(name, fields)


def test_our_vit_in_timm(tmp_path):
    net, architecture = ours("dino_vit_base_patch16", TINY_VIT)
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "vit.safetensors")
    theirs = VisionTransformer(**TIMM_VIT, num_classes=0).eval()
    theirs.load_state_dict(load_file(file))
    close(tokens(theirs), net(IMAGES).tokens)


@pytest.mark.parametrize("class_token", [True, False])
def test_our_vit_with_registers_in_timm(tmp_path, class_token):
    own = {"class_token": class_token, "num_registers": 4, "class_position": False}
    net, architecture = ours("dino_vit_base_patch16", replace(TINY_VIT, **own))
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "vit.safetensors")
    reg4 = {"reg_tokens": 4, "no_embed_class": True, "class_token": class_token}
    pool = "token" if class_token else "avg"
    theirs = VisionTransformer(
        **TIMM_VIT, num_classes=0, global_pool=pool, fc_norm=False, **reg4
    ).eval()
    theirs.load_state_dict(load_file(file))
    expected, k = tokens(theirs), int(class_token)
    close(torch.cat([expected[:, :k], expected[:, k + 4 :]], 1), net(IMAGES).tokens)
    with pytest.raises(WeightsError, match="registers"):
        write(
            [],
            replace(architecture, class_token=True, class_position=True),
            "timm",
            tmp_path / "other.pth",
        )


def test_our_student_vit_in_timms_beit(tmp_path):
    net, architecture = ours("vit_base_patch16", TINY_VIT)
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "beit.safetensors")
    theirs = Beit(
        **TIMM_VIT,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
    ).eval()
    theirs.load_state_dict(load_file(file))
    close(tokens(theirs), net(IMAGES).tokens)


@pytest.mark.parametrize("name", ["swinv2_base", "swin_base_esvit"])
def test_our_swins_in_timm(tmp_path, name):
    net, architecture = ours(name, replace(TINY_SWIN, depths=(2, 3)))
    file = write(net.state_dict().items(), architecture, "timm", tmp_path / "swin.pth")
    make = SwinTransformerV2 if name == "swinv2_base" else SwinTransformer
    theirs = make(**TIMM_SWIN, num_classes=0).eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    close(tokens(theirs), net(IMAGES).tokens)


TINY_MODELS = {name: resolve(name, fields) for name, fields in TINY.items()}
TINY_MODELS["deit"] = resolve("deit_vit_base_patch16", TINY_VIT)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        (name, to)
        for name, model in TINY_MODELS.items()
        for to, export in family_of(model).exports.items()
        if not export.lacks(model, False)
    ],
)
def test_every_format_is_read_back_to_the_bit(name, to):
    model = TINY_MODELS[name]
    export, net = family_of(model).exports[to], scattered(build(model, seed=0))
    state = {
        output.name: output.take(tensor)
        for ours, tensor in net.state_dict().items()
        for output in export.outputs(ours, tuple(tensor.shape), model)
    }
    again = translated(state, FORMATS[detect(state)].format.rows)
    assert not again.dropped
    assert not again.unfit
    expected = {
        copy: tensor
        for ours, tensor in net.state_dict().items()
        for copy in export.copies(ours, model)
    }
    assert again.pieces.keys() == expected.keys()
    for ours, piece in again.pieces.items():
        assert torch.equal(piece.read(state), expected[ours]), ours
