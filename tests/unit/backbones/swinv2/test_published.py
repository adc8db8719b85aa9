"""Published files of Swin V2: the same features as the implementation that wrote them."""

from __future__ import annotations

import pytest
import timm
import torch
from loading import (
    IMAGES,
    TIMM_SWIN,
    TINY_SWIN,
    close,
    loaded,
    opened,
    saved,
    scattered,
    tokens,
)
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import max_relative
from timm.models.swin_transformer_v2 import SwinTransformerV2

from fd_large.backbones.registry import build
from fd_large.backbones.windows import coordinate_table
from fd_large.errors import WeightsError
from fd_large.kernels.window_attention_reference import position_index


@pytest.mark.parametrize("pretrained", [(0, 0), (3, 2)])
def test_swinv2_of_timm(tmp_path, pretrained):
    theirs = scattered(
        SwinTransformerV2(**TIMM_SWIN, pretrained_window_sizes=pretrained, num_classes=3)
    )
    path = saved(theirs, tmp_path / "swinv2.pth")
    assert opened(path).form == "timm_swinv2"
    with pytest.raises(WeightsError, match="pretrained_window_sizes, window_size"):
        loaded(path)
    net, _ = loaded(path, window_size=4, pretrained_window_sizes=pretrained)
    close(net(IMAGES).tokens, tokens(theirs))


def test_a_folder_of_timm_on_the_hub_is_this_family(tmp_path):
    """It would be timm's own module otherwise, whose map is the same: without its fields."""
    arguments = {**TIMM_SWIN, "pretrained_window_sizes": (3, 0)}
    theirs = scattered(timm.create_model("swinv2_tiny_window8_256", num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    assert teacher.model == "swinv2"
    assert teacher.architecture.pretrained_window_sizes == (3, 4)
    close(net(IMAGES).tokens, tokens(theirs))


def test_the_other_swinv2_of_timm_is_refused(tmp_path):
    net = timm.create_model(
        "swinv2_cr_tiny_224", pretrained=False, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    )
    with pytest.raises(WeightsError, match="position bias"):
        opened(saved(net, tmp_path / "cr.pth"))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_swinv2_of_transformers(transformers, tmp_path, head, sharded):
    config = transformers.Swinv2Config(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 3],
        num_heads=[2, 4],
        window_size=4,
        pretrained_window_sizes=[3, 2],
    )
    make = transformers.Swinv2ForImageClassification if head else transformers.Swinv2Model
    model = scattered(make(config))
    model.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    net, teacher = loaded(tmp_path)
    assert teacher.architecture.pretrained_window_sizes == (3, 2)
    with torch.no_grad():
        base = model.swinv2 if head else model
        close(net(IMAGES).tokens, base(pixel_values=IMAGES).last_hidden_state)


def test_official_files_tell_windows_and_image_size(tmp_path):
    net = build("swinv2_base", TINY_SWIN, initialization="official", seed=0)
    state = net.state_dict()
    for stage, window, pretrained in ((0, 4, 3), (1, 4, 2)):
        at = f"layers.{stage}.blocks.0.attn.relative_coords_table"
        made_table = coordinate_table(window, pretrained, torch.device("cpu"))
        state[at] = made_table.view(1, 7, 7, 2)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    torch.save({"model": state}, tmp_path / "v2.pth")
    found = opened(tmp_path / "v2.pth").found
    assert (found.window_size, found.pretrained_window_sizes) == (4, (3, 2))
    assert found.image_size == 32


@pytest.mark.parametrize("name", ["swinv2_official_a", "swinv2_official_b_pretrained_window"])
def test_official_swinv2_tells_its_windows(name, tmp_path):
    spec, tensors = oracle(name)
    state = weights_of(tensors) | {"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(5)}
    config = spec["config"]
    side, table = config["img_size"] // config["patch_size"], config["window_size"]
    # The published files hold every stage's tables; the oracle holds a few.
    for s, pretrained in enumerate(config.get("pretrained_window_sizes", [0] * 4)):
        if s >= len(config["depths"]):
            break
        window = min(table, side // 2**s)
        made = coordinate_table(window, pretrained, torch.device("cpu"))
        n = 2 * window - 1
        for b in range(config["depths"][s]):
            at = f"layers.{s}.blocks.{b}.attn"
            state[f"{at}.relative_coords_table"] = made.view(1, n, n, 2)
            state[f"{at}.relative_position_index"] = position_index(
                window, window, False, torch.device("cpu")
            )
    torch.save({"model": state}, tmp_path / "swinv2.pth")
    net, teacher = loaded(tmp_path / "swinv2.pth")
    assert teacher.architecture.window_size == min(table, side)
    assert_matches(net, spec, tensors, "out.final")


def test_simmim_swinv2_encoder_map(tmp_path):
    """Through the loader with nothing masked, since the mask token belongs to pre-training."""
    spec, tensors = oracle("simmim_swinv2")
    torch.save({"model": weights_of(tensors)}, tmp_path / "simmim.pth")
    found = opened(tmp_path / "simmim.pth")
    assert found.form == "simmim_swinv2"
    assert "encoder.mask_token" in found.dropped
    assert any(name.startswith("decoder.") for name in found.dropped)
    stages = len(spec["config"]["depths"])
    net, _ = loaded(
        tmp_path / "simmim.pth",
        window_size=spec["config"]["window_size"],
        pretrained_window_sizes=(0,) * stages,
    )
    mask, token = tensors["mask"].flatten(1)[..., None], tensors["weights.encoder.mask_token"]

    def masked(module, inputs, output):
        patches = output[0].flatten(1, 2)
        hidden = (patches * (1 - mask) + token * mask).view(output[0].shape)
        return hidden, hidden

    net.patch_embed.register_forward_hook(masked)
    got = net(tensors["input"]).tokens.transpose(1, 2)
    expected = tensors["out.encoder_map"]
    tolerance = spec["suggested_tolerance_max_rel"]
    assert max_relative(got.reshape(expected.shape), expected) <= tolerance


def test_norms_inside_the_mlp_are_named_as_left_over(tmp_path):
    _, tensors = oracle("swinv2_giant_like_a_endnorm")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    state["encoder.layers.1.blocks.0.mlp.norm.weight"] = torch.ones(128)
    torch.save({"model": state}, tmp_path / "fd.pth")
    with pytest.raises(WeightsError, match=r"layers\.1\.blocks\.0\.mlp\.norm"):
        loaded(tmp_path / "fd.pth", window_size=4, pretrained_window_sizes=(0, 0))
