from __future__ import annotations

import torch

from fd_large.backbones.registry import build
from fd_large.recipes.architectures import Architecture
from fd_large.weights.inspection import inspect


def test_inspect_names_published_nets(tmp_path):
    with torch.device("meta"):
        net = build("deit_distilled_vit_base_patch16")
    state = {n: torch.empty(p.shape, dtype=torch.float16) for n, p in net.state_dict().items()}
    torch.save({"model": state}, tmp_path / "deit.pth")
    found = inspect(tmp_path / "deit.pth")
    assert (found.form, found.named) == ("deit", "deit_distilled_vit_base_patch16")
    assert found.facts.licence == "Apache-2.0"
    assert found.dtypes == ("float16",)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    other = inspect(tmp_path / "deit.pth", model="clip_vit_base_patch16")
    assert any("dist_token" in complaint for complaint in other.match.complaints)


def test_inspect_says_what_would_be_resized(tmp_path):
    with torch.device("meta"):
        net = build("dino_vit_base_patch16", Architecture(image_size=384))
    state = {n: torch.empty(p.shape, dtype=torch.float16) for n, p in net.state_dict().items()}
    torch.save(state, tmp_path / "dino.pth")
    found = inspect(tmp_path / "dino.pth", model="dino_vit_base_patch16")
    assert found.match.to_resize == ["pos_embed"]
    assert not found.match.complaints
    assert found.architecture.image_size == 384
