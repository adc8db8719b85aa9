"""timm backbones: the map is timm's own, on any device, in bfloat16, and misfits are named."""

from __future__ import annotations

import pytest
import timm
import torch

from fd_large.backbones.registry import build
from fd_large.backbones.timm import models
from fd_large.backbones.timm.timm_backbone import TimmBackbone
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.errors import ConfigError, ShapeError, VersionError
from fd_large.recipes.architectures import Architecture, resolve


def test_an_old_timm_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    with pytest.raises(VersionError, match=r"got 1\.0\.30, expected 1\.0\.31 or later"):
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
    with pytest.raises(ConfigError, match=f"{name} returns no map of tokens; {reason}"):
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
        (Architecture(timm_name="resnet19"), "student.model.*: .*resnet1"),
        (Architecture(timm_name="resnet18", feature_stride=7), "expected one of 2, 4, 8, 16, 32"),
        (Architecture(feature_stride=-1), "feature_stride: .*positive"),
        (Architecture(depths=(2,)), "timm model without that option"),
    ],
)
def test_misfits_are_named(override, match):
    with pytest.raises(ConfigError, match=match):
        build("timm", override)


def test_sizes_that_are_no_multiple_of_the_stride_are_refused():
    with pytest.raises(ShapeError, match="multiples of the stride 8"):
        build("efficientnet_lite0").grid(100, 128)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7_224", 224),
        ("swinv2_cr_tiny_224", 224),
        ("swinv2_tiny_window8_256", 256),
        ("beit_base_patch16_224", 224),
        ("eva02_tiny_patch14_224", 224),
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
