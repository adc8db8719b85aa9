from __future__ import annotations

import json

import pytest
import timm
import torch
from loading import TINY_VIT
from rich.console import Console
from safetensors.torch import save_file

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.inspection import inspect, table
from fd_large.weights.sidecar import own_config


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


@pytest.mark.parametrize("name", ["timm:resnet18", "module:away.py:Net"])
def test_what_the_project_stored_is_recognised_without_its_code(tmp_path, name):
    config = own_config(resolve(name), IMAGENET)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"encoder.a": torch.ones(64), "decoder.0.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        found = inspect(source)
        assert (found.named, found.own, found.parameters) == (name, True, 64)
        assert found.dropped == ("decoder.0.weight",)


def test_tensors_of_a_library_are_compared_with_the_model_that_is_named(tmp_path):
    state = timm.create_model("test_efficientnet", pretrained=False).state_dict()
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="timm:NAME=FILE"):
        inspect(tmp_path / "net.pth")
    found = inspect(tmp_path / "net.pth", model="timm:test_efficientnet")
    assert (found.form, found.named) == ("timm", "timm:test_efficientnet")
    assert not found.match.complaints
    assert found.statistics is not None
    assert table(found).row_count
    with pytest.raises(WeightsError, match="test_resnet"):
        inspect(tmp_path / "net.pth", model="timm:test_resnet")


def test_names_are_no_markup_and_no_commands_to_a_terminal(tmp_path, capsys):
    net = build("vit_base_patch16", TINY_VIT, initialization="none")
    state = {n: torch.zeros(t.shape) for n, t in net.state_dict().items()}
    save_file(state | {"[/red]\x1b[2J": torch.zeros(1)}, tmp_path / "[bold].safetensors")
    Console().print(table(inspect(tmp_path / "[bold].safetensors")))
    shown = capsys.readouterr().out
    assert "[/red]?[2J" in shown
    assert "[bold]" in shown.replace("\n", "")  # Long paths are wrapped.
    assert "\x1b[2J" not in shown
    assert str(WeightsError("a\x1b[2Jb\nc")) == "a?[2Jb\nc"


def test_a_folder_that_says_which_model_of_a_library_it_is(transformers, tmp_path):
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**fields)).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert (found.named, found.form) == ("transformers:dinov2", "transformers")
    assert found.match.complaints == []
    assert found.dtypes == ("float32",)
    assert table(found).row_count
