"""A configuration beside the weights tells what names and shapes cannot."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from loading import (
    HF_VIT,
    IMAGES,
    TIMM_SWIN,
    TIMM_VIT,
    TINY,
    close,
    loaded,
    made,
    scattered,
    tokens,
)
from torch import nn

from fd_large.errors import WeightsError
from fd_large.recipes.architectures import resolve
from fd_large.weights.convert import write
from fd_large.weights.source import Sources


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swinv2_tiny_window8_256", {**TIMM_SWIN, "pretrained_window_sizes": (3, 2)}),
        ("swin_tiny_patch4_window7_224", TIMM_SWIN),
        ("vit_base_patch16_clip_quickgelu_224", {**TIMM_VIT, "act_layer": "quick_gelu"}),
        ("beit_base_patch16_224", TIMM_VIT),
    ],
)
def test_a_folder_of_timm_on_the_hub_tells_everything(tmp_path, name, arguments):
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    config = theirs.pretrained_cfg
    assert teacher.statistics == (*config["mean"], *config["std"])
    expected = tokens(theirs)
    if hasattr(theirs, "fc_norm") and not isinstance(theirs.fc_norm, nn.Identity):
        expected = nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    close(net(IMAGES).tokens, expected)


def test_a_damaged_config_is_named(tmp_path):
    net, architecture = (
        made("vit_base_patch16"),
        resolve("vit_base_patch16", TINY["vit_base_patch16"]),
    )
    write(net.state_dict().items(), architecture, "fd", tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: damaged or not JSON"):
        Sources().open(tmp_path / "net")
    bad = {"fd_large": {"architecture": {"colour": 1}}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(bad))
    with pytest.raises(WeightsError, match="fields of no architecture"):
        Sources().open(tmp_path / "net")


@pytest.mark.parametrize(
    "config",
    [
        {"fd_large": 3},
        {"fd_large": {"architecture": ["embed_dim"]}},
        {"architecture": "vit_base_patch16_224", "pretrained_cfg": None},
    ],
)
def test_a_malformed_configuration_is_one_sentence(config, tmp_path):
    torch.save(made("vit_base_patch16").state_dict(), tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"not what its format has|config"):
        Sources().open(tmp_path / "net.pth")


def test_statistics_come_from_the_preprocessor(transformers, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF_VIT)).save_pretrained(tmp_path)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    _, teacher = loaded(tmp_path)
    assert teacher.statistics == (0.5,) * 6


def test_without_its_config_a_folder_asks_for_what_is_not_told(transformers, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**HF_VIT)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path)
    assert "got no activation, norm_eps, num_heads" in str(caught.value)
    loaded(tmp_path, activation="gelu", norm_eps=1e-12, num_heads=(4,))
