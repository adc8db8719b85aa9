"""Models of transformers as teachers: held to transformers' own forward."""

from __future__ import annotations

import json

import pytest
import torch
from loading import HF_VIT, close, loaded, scattered, student_run
from torch import nn

from fd_large.backbones.registry import build
from fd_large.errors import ConfigError, ShapeError, WeightsError

CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
DINO = {key: value for key, value in HF_VIT.items() if key != "intermediate_size"}
HIERA = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "image_size": [64, 64]}
# Class, fields, tokens before the patches, pixels per token.
MODELS = {
    "Dinov2": (DINO, 1, 8),
    "Dinov2WithRegisters": ({**DINO, "num_register_tokens": 3, "use_swiglu_ffn": True}, 4, 8),
    "DINOv3ViT": ({**HF_VIT, "num_register_tokens": 2}, 3, 8),
    "DINOv3ConvNext": (CONVNEXT, 1, 32),
    "SiglipVision": (HF_VIT, 0, 8),
    "ConvNext": (CONVNEXT, 0, 32),
    "ConvNextV2": (CONVNEXT, 0, 32),
    "IJepa": (HF_VIT, 0, 8),
    "Hiera": (HIERA, 0, 32),
}


def folder(transformers, name, fields, path):
    """A tiny random model of transformers, and its folder as transformers writes it."""
    theirs = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**fields))
    scattered(theirs).save_pretrained(path)
    half = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(half))
    return theirs


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("name", MODELS)
def test_the_map_is_the_last_hidden_state(transformers, name, side, tmp_path):
    fields, prefix, stride = MODELS[name]
    theirs = folder(transformers, name, fields, tmp_path)
    net, teacher = loaded(tmp_path)
    assert (teacher.model, teacher.statistics) == ("transformers", (0.4, 0.5, 0.6, 0.5, 0.5, 0.5))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    more = {"interpolate_pos_encoding": True} if name in ("SiglipVision", "IJepa", "Hiera") else {}
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=name == "Hiera" and side == 64, **more)
        found = net(images)
    tokens = expected.last_hidden_state
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).mT
    if name == "Hiera" and side == 64:  # Its own reordered map shows where each token is.
        tokens = expected.reshaped_hidden_states[-1].flatten(1, 2)
    close(found.tokens, tokens)
    assert found.grid == (side // stride, side // stride) == net.grid(side, side)
    assert (found.num_prefix_tokens, net.width) == (prefix, tokens.shape[-1])
    with pytest.raises(ShapeError, match=f"stride {stride}"):
        net.grid(side + 1, side)


@pytest.mark.parametrize("side", [32, 48])
def test_siglip_2_is_given_patches_as_its_processor_cuts_them(transformers, side, tmp_path):
    fields = {key: value for key, value in HF_VIT.items() if key != "image_size"}
    theirs = folder(transformers, "Siglip2Vision", {**fields, "num_patches": 16}, tmp_path)
    net, _ = loaded(tmp_path)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    cut = transformers.Siglip2ImageProcessor(
        do_resize=False, do_rescale=False, do_normalize=False, patch_size=8, max_num_patches=36
    )
    given = cut(list(images), return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state[:, : (side // 8) ** 2]
        close(net(images).tokens, expected)


def test_the_vision_model_of_a_larger_one(transformers, tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.SiglipConfig(
        vision_config={**HF_VIT, "hidden_act": "gelu"},
        text_config={**text, "num_attention_heads": 2, "projection_size": 32},
    )
    theirs = scattered(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path)
    net, teacher = loaded(tmp_path)
    assert teacher.statistics == (0.5,) * 6
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(net(images).tokens, theirs.vision_model(images).last_hidden_state)


def test_dinov3_without_registers(transformers, tmp_path):
    """Its tensor of registers has no element."""
    theirs = folder(transformers, "DINOv3ViT", {**HF_VIT, "num_register_tokens": 0}, tmp_path)
    net, _ = loaded(tmp_path)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(net(images).tokens, theirs(images).last_hidden_state)
    assert net(images).num_prefix_tokens == 1


def test_in_bfloat16(transformers, tmp_path):
    for name in ("DINOv3ViT", "SiglipVision", "ConvNextV2", "Hiera"):
        folder(transformers, name, MODELS[name][0], tmp_path)
        net, _ = loaded(tmp_path)
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        exact = net(images).tokens
        rounded = net.bfloat16()(images.bfloat16()).tokens
        assert rounded.dtype == torch.bfloat16
        cosine = nn.functional.cosine_similarity(rounded.float(), exact, dim=-1)
        assert cosine.min() > 0.95


def test_what_does_not_teach(transformers, tmp_path):
    folder(transformers, "Dinov2", DINO, tmp_path)
    with pytest.raises(ConfigError, match="can only be teachers"):
        build("transformers:dinov2", is_trained=True)
    with pytest.raises(WeightsError, match="timm:NAME"):
        student_run(tmp_path, "vit_base_patch16")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, told in (
        ({"hidden_act": "nosuch"}, "cannot build"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"hidden_act": {"a": "b"}}, "hidden_act"),
        ({"patch_size": 0}, "cannot build"),
        ({"num_channels": 4}, "num_channels"),
        ({"hidden_size": 64}, "another shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "left over"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=told):
            loaded(tmp_path)
