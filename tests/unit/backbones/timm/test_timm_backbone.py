"""timm backbones: the map is timm's own, on any device, in bfloat16, and misfits are named."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_timm import tiny
from torch.nn.modules.batchnorm import _BatchNorm

from fd_large.backbones import batch_norm
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.backbones.timm import models
from fd_large.backbones.timm.timm_backbone import TimmBackbone
from fd_large.engine.frozen import Frozen
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.errors import ConfigError, ShapeError, VersionError
from fd_large.recipes.architectures import Architecture, resolve


def test_an_old_timm_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    with pytest.raises(VersionError, match=r"1\.0\.30.* 1\.0\.31"):
        models.create("resnet18")


def with_running_statistics(net):
    """Fresh models have mean 0 and variance 1 everywhere: an error there would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return net


@pytest.mark.parametrize(
    ("name", "stride", "width"),
    [("tf_efficientnet_lite0", 8, 40), ("tf_efficientnet_lite0", 16, 112), ("resnet18", 16, 256)],
)
def test_an_earlier_map_is_the_one_that_timm_gives_out(name, stride, width):
    net = with_running_statistics(TimmBackbone(name, stride=stride)).eval()
    index = next(
        i
        for i, stage in enumerate(timm.create_model(name).feature_info)
        if stage["reduction"] == stride
    )
    theirs = timm.create_model(name, features_only=True, out_indices=(index,)).eval()
    state = {key.removeprefix("net."): value for key, value in net.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        feature_map = net(images)
        (expected,) = theirs(images)
    assert (net.width, net.stride, feature_map.num_prefix_tokens) == (width, stride, 0)
    assert feature_map.grid == net.grid(64, 96) == (64 // stride, 96 // stride)
    assert feature_map.tokens.shape == (2, 64 * 96 // stride**2, width)
    torch.testing.assert_close(feature_map.tokens, expected.flatten(2).transpose(1, 2))
    # What the map needs is there, and what comes after it is not.
    assert not set(missing) & set(state)
    count = sum(p.numel() for p in net.parameters())
    assert count <= sum(p.numel() for p in theirs.parameters())


def with_random_norms(net):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return with_running_statistics(net)


# Convolutions or activations after the last stage; class attention; no round stride; a class token
# that the model does not count; channels last.
@pytest.mark.parametrize(
    ("name", "size", "grid", "width"),
    [
        ("tf_efficientnet_lite0", 64, 2, 1280),
        ("fastvit_t8", 64, 2, 768),
        ("nfnet_l0", 64, 2, 2304),
        ("xcit_nano_12_p16_224", 224, 14, 128),
        ("efficientvit_m0", 224, 4, 192),
        ("coat_lite_tiny", 224, 7, 320),
        ("mambaout_femto", 64, 2, 288),
        ("efficientnet_b1", 240, 8, 1280),
    ],
)
def test_the_last_map_is_what_forward_features_returns(name, size, grid, width):
    whole = with_random_norms(timm.create_model(name)).eval()
    net = TimmBackbone(name).eval()
    state = whole.state_dict()
    net.net.load_state_dict({key: state[key] for key in net.net.state_dict()})
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        found, theirs = net(images), whole.forward_features(images)
    if theirs.dim() == 4:
        theirs = theirs.flatten(1, 2) if theirs.shape[-1] == width else theirs.flatten(2).mT
    assert (found.grid, net.width) == ((grid, grid), width)
    torch.testing.assert_close(found.tokens, theirs[:, -(grid**2) :], rtol=1e-5, atol=1e-5)
    assert net.gives_summary == name.startswith("xcit")
    if net.gives_summary:
        torch.testing.assert_close(found.summary, theirs[:, :1], rtol=1e-5, atol=1e-5)
    assert not any(key.startswith(("head", "classifier")) for key in net.net.state_dict())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crossvit_9_240", "got 2 tensors"),
        ("efficientvim_m1", "got 4 tensors"),
        ("pit_ti_224", "got 1 tokens of 224x224"),
        ("inception_v3", "got 8x8 tokens of 299x299"),
    ],
)
def test_a_model_without_a_map_is_refused_by_name(name, reason):
    with pytest.raises(ConfigError, match=f"{name} .*{reason}"):
        TimmBackbone(name)


def test_efficientnet_lite0_up_to_stride_8():
    architecture = resolve("efficientnet_lite0")
    assert (architecture.timm_name, architecture.feature_stride) == ("tf_efficientnet_lite0", 8)
    net = build("efficientnet_lite0")
    assert sum(p.numel() for p in net.parameters()) == 55_504
    assert (net.drop_path_rates, net.blocks()) == ((), [])


def test_other_nets_come_by_overrides():
    net = build("timm", Architecture(timm_name="resnet18", feature_stride=8))
    assert (net.width, net.stride) == (128, 8)


def test_a_vision_transformer_without_its_class_token():
    net = TimmBackbone("vit_tiny_patch16_224", stride=16).eval()
    feature_map = net(torch.randn(1, 3, 224, 224))
    assert feature_map.tokens.shape == (1, 196, 192)
    assert feature_map.summary.shape == (1, 1, 192)
    registers_alone = TimmBackbone("vit_pwee_patch16_reg1_gap_256")
    assert not registers_alone.gives_summary
    with pytest.raises(ShapeError, match=r"--objective\.teacher_image_size 224"):
        net.grid(192, 192)


def test_on_the_meta_device():
    with torch.device("meta"):
        net = build("efficientnet_lite0").eval()
        assert all(t.is_meta for t in net.state_dict().values())
        assert net(torch.empty(2, 3, 128, 128)).tokens.shape == (2, 256, 40)


def test_a_seed_makes_the_same_net_again():
    a, b = (build("efficientnet_lite0", seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bfloat16_weights_keep_float32_statistics():
    net = with_running_statistics(TimmBackbone("tf_efficientnet_lite0", stride=8)).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = net(images).tokens
        for parameter in net.parameters():  # As the engine does: buffers are left alone.
            parameter.data = parameter.data.bfloat16()
        rounded = net(images.bfloat16()).tokens
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert error < 0.02  # A few of bfloat16's 2^-9 steps over some twenty layers.


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (Architecture(timm_name="resnet19"), "^model: .*resnet1"),
        (Architecture(timm_name="resnet18", feature_stride=7), "expected one of 2, 4, 8, 16, 32"),
        (Architecture(feature_stride=-1), "feature_stride: .*positive"),
        (Architecture(depths=(2,)), "timm model without that option"),
    ],
)
def test_misfits_are_named(override, match):
    with pytest.raises(ConfigError, match=match):
        build("timm", override)


def test_sizes_that_are_no_multiple_of_the_stride_are_refused():
    with pytest.raises(ShapeError, match="stride 8"):
        build("efficientnet_lite0").grid(100, 128)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (tiny("swin_tiny_patch4_window7_224"), 224),
        (tiny("swinv2_cr_tiny_224"), 224),
        (tiny("swinv2_tiny_window8_256"), 256),
        (tiny("beit_base_patch16_224"), 224),
        (tiny("eva02_tiny_patch14_224"), 224),
    ],
)
def test_buffers_that_meet_the_weights_are_bfloat16_too(name, size):
    net = TimmBackbone(name).eval()
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        exact = net(images).tokens
        to_bfloat16(net)
        rounded = net(images.bfloat16()).tokens
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


# One model of each of timm's families that teaches. In every suite: those with buffers that meet
# the weights (tiny ones: above), with tables of positions, and with norms of their own.
TABLES = """
convit_tiny efficientvit_m0 levit_128s test_byobnet test_coatnet test_efficientnet_evos test_nfnet
test_resnet test_vit2 test_vit_relpos tiny_vit_5m_224 xcit_nano_12_p16_224
"""
OTHERS = """
beit_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256
caformer_s18 cait_xxs24_224 coat_lite_tiny convmixer_768_32 cpubone_nano cs3darknet_focus_s
cspnext_tiny csatv2 davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0 ese_vovnet19b_slim_dw
fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 gmlp_ti16_224
hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
lambda_resnet26t lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0 mobilenetv3_small_050
mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny
nextvit_small pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
repvit_m0_9 res2net50_14w_8s resnest14d resnetv2_18 rexnet_100 sam2_hiera_tiny
samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
test_convnext test_mambaout tnt_s_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41
"""


# With batch norms, as students from random weights.
TRAINED = """
cspdarknet53 densenet121 dla34 dpn68 edgenext_xx_small efficientformer_l1 efficientvit_b0 fastvit_t8
ghostnet_100 gcresnext26ts hrnet_w18_small mobilenetv3_small_050 mobilenetv4_conv_small_050
mobilevit_xxs regnety_004 repghostnet_050 repvgg_a0 res2net50_14w_8s resnet50 resnest14d rexnet_100
selecsls42 shvit_s1 skresnet18 tresnet_m vgg11_bn visformer_tiny xception41
"""


def small_size(name):
    """The side of small images that a model takes; 0 is its own."""
    size, layout = models.sized(name, 0), models.last_map(name, 0).layout
    if not layout.is_regular or (size.is_only and not models.can_resize(name)):
        return 0
    return layout.stride * (4 if layout.stride <= 16 else 2)


def as_timm_is(net):
    """A copy of a backbone's model in which timm's own code computes."""
    plain = copy.deepcopy(net.net).eval()
    for module in plain.modules():
        if module is plain or isinstance(module, _BatchNorm):
            del module.forward
    return plain


@pytest.mark.parametrize(
    "name",
    [*TABLES.split(), *(pytest.param(name, marks=pytest.mark.sweep) for name in OTHERS.split())],
)
def test_a_model_of_each_family_teaches_in_bfloat16(name):
    size = small_size(name)
    torch.manual_seed(0)
    # Fresh weights alone let the map of some models fade to what rounding makes of it.
    net = with_random_norms(TimmBackbone(name, image_size=size))
    plain = as_timm_is(net).bfloat16()
    teacher = Frozen(net, IMAGENET)
    side = size or models.sized(name, 0).side
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    exact = teacher(images).tokens
    to_bfloat16(teacher)
    rounded = teacher(images).tokens
    with torch.no_grad():
        theirs = models.map_of(plain, net._stage, normalise(images, IMAGENET).bfloat16())
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert rounded.isfinite().all()

    def distance(tokens):
        return (tokens.float() - exact).norm() / exact.norm()

    # Rounding takes the map of some models far (Gemma's by a third), whoever computes it.
    assert distance(rounded) < 1.5 * distance(theirs) + 0.02


def by_torch(norm, moments, x):
    """Torch's own norm of each pair of images, and the activation that timm's class adds."""
    found = []
    for pair in x.split(len(x) // 2):
        mean, variance = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
        weights = (norm.weight, norm.bias)
        found.append(F.batch_norm(pair, mean, variance, *weights, True, 1.0, norm.eps))
        moments[norm].append(torch.stack([mean, variance]))
    y = torch.cat(found)
    for name in ("drop", "act"):
        y = getattr(norm, name)(y) if getattr(norm, name, None) else y
    return y


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "efficientnet_b0", "levit_128s"),
        *(pytest.param(name, marks=pytest.mark.sweep) for name in TRAINED.split()),
    ],
)
def test_batch_norms_of_a_student_are_torch_s_of_each_group(name):
    size = small_size(name)
    side = size or models.sized(name, 0).side
    torch.manual_seed(0)
    net = TimmBackbone(name, image_size=size, is_trained=True).double().train()
    theirs, images = copy.deepcopy(net), torch.randn(4, 3, side, side, dtype=torch.float64)
    moments = defaultdict(list)
    for module in theirs.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(by_torch, module, moments)
    for groups in {norm.norm_groups for norm in batch_norm.norms_of(net)}:
        groups.size = 2
    for model in (net, theirs):
        tokens = model(images).tokens
        (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    torch.testing.assert_close(net(images).tokens, theirs(images).tokens, rtol=1e-7, atol=1e-9)
    largest = max(p.grad.abs().max().item() for p in theirs.parameters())
    for ours, plain in zip(net.parameters(), theirs.parameters(), strict=True):
        assert (ours.grad - plain.grad).abs().max() <= 1e-6 * largest
    batch_norm.move(batch_norm.norms_of(net))
    for ours, plain in zip(net.modules(), theirs.modules(), strict=True):
        if plain in moments:
            mean, variance = torch.stack(moments[plain][:2]).mean(0)
            torch.testing.assert_close(ours.running_mean, ours.momentum * mean)
            torch.testing.assert_close(
                ours.running_var, 1 - ours.momentum + ours.momentum * variance
            )


@pytest.mark.sweep
def test_every_family_that_teaches_is_tried_in_bfloat16():
    def families(names):
        return {timm.model_entrypoint(name).__module__ for name in names}

    without = {"crossvit", "efficientvim", "inception_resnet_v2", "inception_v3", "inception_v4"}
    tried = families([*TABLES.split(), *OTHERS.split()])
    left = {m.rpartition(".")[2] for m in families(timm.list_models()) - tried}
    assert left - {"test_measure"} == {*without, "pit"}


def test_a_size_that_does_not_divide_into_patches_is_taken_if_it_is_the_models_own():
    name = 'test_vit{"dynamic_img_size": false, "patch_size": 14}'
    net = TimmBackbone(name).eval()
    theirs = timm.create_model("test_vit", patch_size=14, dynamic_img_size=False).eval()
    state = {key.removeprefix("net."): value for key, value in net.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 160, 160)  # 11.4 patches.
    with torch.no_grad():
        assert net(images).tokens.equal(theirs.forward_features(images)[:, 1:])
    assert net.grid(160, 160) == (11, 11)
    assert TimmBackbone(name, image_size=70).grid(70, 70) == (5, 5)


def test_the_maps_of_its_stages_are_timms():
    net = with_running_statistics(TimmBackbone("resnet18")).eval()
    theirs = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    state = {key.removeprefix("net."): value for key, value in net.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 60, 97)  # Padded to 64 x 128 pixels.
    with torch.no_grad():
        maps = net.stages(images)
        expected = theirs(torch.nn.functional.pad(images, (0, 31, 0, 4)))
    assert net.stage_strides == (4, 8, 16, 32)
    assert net.stage_widths == (64, 128, 256, 512)
    for found, like in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, like.permute(0, 2, 3, 1))


def test_a_size_that_a_model_of_any_size_does_not_take_is_refused_in_a_sentence():
    with torch.device("meta"):
        net = TimmBackbone("halonet_h1")
    assert net.grid(256, 256) == (8, 8)
    with pytest.raises(ShapeError, match="halonet_h1"):
        net.grid(96, 96)
