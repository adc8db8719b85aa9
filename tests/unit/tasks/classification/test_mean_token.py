"""The feature that a classifier is given, of each kind of model."""

from __future__ import annotations

import pytest
import torch
from tiny_timm import tiny
from torch.nn.functional import layer_norm

from fd_large.backbones.registry import build
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.classification.mean_token import mean_token, norm_of_mean

VIT = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=32)
SWIN = Architecture(
    embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2, patch_size=4, image_size=32
)


@pytest.mark.parametrize(
    ("name", "shape", "norms_mean"),
    [
        # The official Swin takes the mean of what its final norm gives (forward_features).
        ("swinv2_tiny", SWIN, False),
        ("swin_base_esvit", SWIN, False),
        ("vit_base_patch16", VIT, True),
        (f"timm:{tiny('convnextv2_atto')}", Architecture(image_size=32), True),
    ],
)
def test_a_mean_that_is_normalised_where_the_map_is_not(name, shape, norms_mean):
    model = build(name, shape, seed=0).eval()
    raw: list[torch.Tensor] = []
    if name.startswith("vit"):
        model.norm.register_forward_hook(lambda norm, given, result: raw.append(given[0]))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model(pixels)
        # A ViT's mean is of what its final norm is given.
        tokens = raw[0] if raw else features.tokens
        expected = tokens[:, features.num_prefix_tokens :].mean(1)
        if norms_mean:
            expected = layer_norm(expected, expected.shape[-1:], eps=1e-6)
        norm = norm_of_mean(model)
        torch.testing.assert_close(mean_token(model(pixels), norm), expected)
