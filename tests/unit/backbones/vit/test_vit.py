from __future__ import annotations

import pytest
import torch
from loading import IMAGES, TIMM_VIT, close, scattered, tokens
from timm.models.vision_transformer import VisionTransformer
from translated_names import translate

from fd_large.backbones.position_tables import resize_positions, resize_table
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels.window_attention_reference import position_index

STUDENT = {
    "absolute_position": False,
    "relative_position": "shared",
    "layer_scale": 0.1,
    "qkv_bias": "qv",
}


def tiny(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(16, 2, 2, patch_size=4, image_size=16, **options)


def names(net) -> set[str]:
    return set(dict(net.named_parameters()))


def test_student_names():
    got = names(tiny(**STUDENT))
    assert {
        "cls_token",
        "rel_pos_bias.relative_position_bias_table",
        "patch_embed.proj.bias",
        "blocks.1.gamma_1",
        "blocks.1.attn.q_bias",
        "blocks.1.attn.v_bias",
        "blocks.1.attn.qkv.weight",
        "blocks.1.mlp.fc1.weight",
        "norm.weight",
    } <= got
    assert not got & {"pos_embed", "blocks.1.attn.k_bias", "blocks.1.attn.qkv.bias"}


def test_teacher_names():
    got = names(tiny(pre_norm_layer=True, patch_bias=False, distillation_token=True))
    assert {"dist_token", "pos_embed", "norm_pre.weight", "blocks.0.attn.qkv.bias"} <= got
    assert not got & {"patch_embed.proj.bias", "blocks.0.gamma_1", "blocks.0.attn.q_bias"}
    assert "blocks.1.attn.relative_position_bias_table" in names(tiny(relative_position="block"))


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"class_token": False}, 0),
        ({"distillation_token": True}, 2),
        ({"distillation_token": True, "keep_distillation_token": False}, 1),
    ],
)
def test_prefix_tokens(options, prefix):
    net = tiny(**options)
    feature_map = net(torch.randn(2, 3, 16, 16))
    assert feature_map.num_prefix_tokens == net.num_prefix_tokens == prefix
    assert feature_map.tokens.shape == (2, prefix + 16, 16)
    assert feature_map.grid == (4, 4)


def test_dropped_distillation_token_leaves_the_others():
    images = torch.randn(1, 3, 16, 16)
    whole = tiny(distillation_token=True)(images).tokens
    without = tiny(distillation_token=True, keep_distillation_token=False)(images).tokens
    assert torch.equal(without, whole[:, [0, *range(2, 18)]])


def test_key_bias_cannot_change_the_output():
    images = torch.randn(1, 3, 16, 16)
    net = tiny(qkv_bias="qkv")
    before = net(images).tokens
    with torch.no_grad():
        net.blocks[0].attn.k_bias.normal_()
    torch.testing.assert_close(net(images).tokens, before, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        net.blocks[0].attn.q_bias.normal_()
        net.blocks[0].attn.v_bias.normal_()
    assert not torch.allclose(net(images).tokens, before, atol=1e-3)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"18x16 .*multiples of 4"):
        tiny()(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ShapeError, match=r"5x4 .*4x4"):
        tiny(**STUDENT)(torch.zeros(1, 3, 20, 16))
    free = tiny(absolute_position=False)
    assert free(torch.zeros(1, 3, 20, 8)).grid == (5, 2)


@pytest.mark.parametrize("options", [{}, STUDENT])
def test_positions_are_resized_to_images_of_another_size(options):
    net, fixed = tiny(**options, resizes_positions=True), tiny(**options)
    images = torch.rand(2, 3, 24, 24)
    assert torch.equal(net(images[..., :16, :16]).tokens, fixed(images[..., :16, :16]).tokens)
    # The same as a model whose weights were resized when they were loaded.
    torch.manual_seed(0)
    larger = ViT(16, 2, 2, patch_size=4, image_size=24, **options)
    with torch.no_grad():
        for (name, theirs), own in zip(larger.named_parameters(), net.parameters(), strict=True):
            if name == "pos_embed":
                own = resize_positions(own, 1, 6)
            elif "table" in name:
                own.normal_()
                own = resize_table(own, 11 * 11 + 3, 3)
            theirs.copy_(own)
    torch.testing.assert_close(net(images).tokens, larger(images).tokens)
    net(images).tokens.square().sum().backward()
    table = net.pos_embed if net.pos_embed is not None else next(net.rel_pos_bias.parameters())
    assert (table.grad != 0).any(-1).all()
    assert net(images[..., :8, :8]).grid == (2, 2)
    with pytest.raises(ConfigError, match="relative_position"):
        tiny(relative_position="block", resizes_positions=True)


@pytest.mark.parametrize("options", [{}, {"class_token": False}])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_registers_are_those_of_timms_reg4_models(options, scale):
    theirs = scattered(
        VisionTransformer(
            **TIMM_VIT,
            num_classes=0,
            reg_tokens=4,
            no_embed_class=True,
            init_values=scale,
            global_pool="avg",
            fc_norm=False,
            **options,
        )
    )
    net = ViT(
        32,
        2,
        2,
        patch_size=8,
        image_size=32,
        class_position=False,
        num_registers=4,
        layer_scale=scale or 0.0,
        **options,
    )
    net.load_state_dict(dict(translate("dino", theirs.state_dict().items())))
    expected, k = tokens(theirs), net.num_prefix_tokens
    found = net(IMAGES)
    assert found.num_prefix_tokens == k == int(net.cls_token is not None)
    close(found.tokens, torch.cat([expected[:, :k], expected[:, k + 4 :]], 1))
    assert list(net.after_blocks(IMAGES))[-1].shape == expected.shape


def test_registers_join_the_relations_of_the_class_token():
    """Where all tokens but the patches are alike, so is what a shared table adds for them."""
    net = scattered(tiny(**STUDENT, num_registers=2))
    rows = net.rel_pos_bias.relative_position_bias_table.shape[0]
    assert rows == 7 * 7 + 3
    index = position_index(4, 4, 3, torch.device("cpu"))
    assert index.shape == (19, 19)
    assert torch.equal(index[2:, 2:], position_index(4, 4, 1, torch.device("cpu")))
    for prefix in (0, 1, 2):
        assert index[prefix, 3:].unique().tolist() == [rows - 3]
        assert index[3:, prefix].unique().tolist() == [rows - 2]
    assert index[:3, :3].unique().tolist() == [rows - 1]
    images = torch.randn(2, 3, 16, 16)
    found = net(images)
    assert found.tokens.shape == (2, 17, 16)
    found.tokens.square().sum().backward()
    assert (net.reg_token.grad != 0).all()
    assert (net.rel_pos_bias.relative_position_bias_table.grad != 0).all()
    with torch.no_grad():
        net.reg_token.normal_()
        assert not torch.allclose(net(images).tokens, found.tokens)


def test_registers_are_of_the_first_layer_and_leave_other_weights_alone():
    with_registers, without = tiny(num_registers=2), tiny()
    assert with_registers.layer_id("reg_token") == 0
    assert with_registers.pos_embed.shape == without.pos_embed.shape
    assert names(with_registers) - names(without) == {"reg_token"}


def test_position_tables_decay_and_tokens_do_not():
    net = tiny(**STUDENT)
    assert net.no_weight_decay() == {"pos_embed", "cls_token", "dist_token", "reg_token"}
    assert net.no_weight_decay_keywords() == ()


@pytest.mark.parametrize("options", [STUDENT, {"num_registers": 2}, {"class_token": False}])
def test_some_patches_alone_are_encoded_at_their_own_positions(options):
    """In any order: of all patches it is the whole image's map, of some what these alone attend."""
    net = scattered(tiny(**options))
    whole = net(IMAGES[:2, :, :16, :16])
    places = torch.stack([torch.randperm(16) for _ in range(2)])
    found = net(IMAGES[:2, :, :16, :16], None, places)
    prefix = whole.num_prefix_tokens
    index = places[..., None].expand(-1, -1, 16)
    assert found.grid == whole.grid
    in_order = torch.cat([whole.tokens[:, :prefix], whole.tokens[:, prefix:].gather(1, index)], 1)
    close(found.tokens, in_order)
    some = net(IMAGES[:2, :, :16, :16], None, places[:, :5])
    alone = net(IMAGES[1:2, :, :16, :16], None, places[1:, :5])
    assert some.tokens.shape == (2, prefix + 5, 16)
    close(some.tokens[1:], alone.tokens)
    assert not torch.allclose(some.tokens[:, prefix:], found.tokens[:, prefix : prefix + 5])


def test_tables_of_blocks_cannot_encode_some_patches_alone():
    assert tiny(**STUDENT).encodes_some
    assert not tiny(relative_position="block").encodes_some
