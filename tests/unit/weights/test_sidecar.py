"""A configuration beside the weights tells what names and shapes cannot."""

from __future__ import annotations

import pytest
import timm
import torch
from loading import close, loaded, scattered
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 3),
    "num_heads": (2, 4),
    "window_size": 4,
}


@pytest.mark.parametrize(
    ("name", "arguments", "side"),
    [
        ("swinv2_tiny_window8_256", {**SWIN, "pretrained_window_sizes": (3, 2)}, 32),
        ("swin_tiny_patch4_window7_224", SWIN, 32),
        ("vit_base_patch16_clip_quickgelu_224", {**VIT, "act_layer": "quick_gelu"}, 32),
        ("beit_base_patch16_224", VIT, 32),
    ],
)
def test_a_folder_of_timm_on_the_hub_tells_everything(tmp_path, name, arguments, side):
    theirs = scattered(timm.create_model(name, num_classes=0, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    net, teacher = loaded(tmp_path)
    config = theirs.pretrained_cfg
    assert teacher.statistics == (*config["mean"], *config["std"])
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    got = net(images).tokens
    if hasattr(theirs, "fc_norm") and not isinstance(theirs.fc_norm, nn.Identity):
        expected = nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
    close(got, expected.flatten(1, 2) if expected.dim() == 4 else expected)
