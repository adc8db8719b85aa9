"""The weights of a start are located and opened once."""

from __future__ import annotations

import pytest
import torch
from loading import scattered, teacher_run

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.engine.frozen import frozen_weights
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.sections import FrozenModel
from fd_large.weights import source as module
from fd_large.weights.read import Tensors
from fd_large.weights.settle import settle_model
from fd_large.weights.source import Sources, Stored

VIT = Architecture(embed_dim=32, depths=(1,), num_heads=(2,), patch_size=8, image_size=32)


@pytest.fixture
def vit(tmp_path):
    net = scattered(build("dino_vit_base_patch16", VIT))
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read, in order."""
    seen, read = [], module.read
    monkeypatch.setattr(
        module, "read", lambda path, **options: (seen.append(path), read(path, **options))[1]
    )
    return seen


def test_a_file_is_read_once_from_the_recipe_to_the_tensors(vit, reads):
    sources = Sources()
    section = FrozenModel(source=str(vit), architecture=Architecture(num_heads=(2,)))
    settled = settle_model(section, sources)
    weights = dict(frozen_weights(settled, sources))
    assert weights.keys() == torch.load(vit, weights_only=True).keys()
    assert sources.path(settled.source) == vit
    assert reads == [str(vit)]
    sources.forget()
    sources.open(vit)
    assert len(reads) == 2


def test_files_of_a_library_too(tmp_path, reads):
    torch.save(build("timm", seed=0).net.state_dict(), tmp_path / "resnet50.pth")
    sources, model = Sources(), resolve("timm")
    for _ in range(2):
        assert len(dict(sources.fitted(str(tmp_path / "resnet50.pth"), model))) > 50
    assert sources.path(str(tmp_path / "resnet50.pth")) == tmp_path / "resnet50.pth"
    assert len(reads) == 1


def test_what_is_no_file_is_asked_of_the_reader_once(tmp_path):
    """A run that trains on must not show a start two checkpoints."""
    asked = []
    model = resolve("dino_vit_base_patch16", VIT)
    net = scattered(build(model))

    def reader(path, where):
        asked.append(path)
        return Stored(tmp_path / "step_7", Tensors(net.state_dict()), model, IMAGENET)

    sources = Sources(reader)
    weights = sources.open(tmp_path / "run")
    assert (weights.source, weights.own) == (str(tmp_path / "step_7"), True)
    assert sources.open(weights.source) is weights
    assert sources.path(weights.source) == tmp_path / "step_7"
    assert asked == [tmp_path / "run"]


def test_nothing_at_all_is_still_one_sentence():
    run = teacher_run("", "clip_vit_base_patch16")
    with pytest.raises(ConfigError, match=r"--teacher\.source"):
        frozen_weights(run.teacher, Sources())
    assert frozen_weights(teacher_run("random", "clip_vit_base_patch16").teacher, Sources()) is None
