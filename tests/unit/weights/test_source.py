"""The weights of a start are located and opened once."""

from __future__ import annotations

import pytest
import torch
from loading import scattered, teacher_run

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.engine.frozen import frozen_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.sections import FrozenModel
from fd_large.weights import source as module
from fd_large.weights.inspection import inspect
from fd_large.weights.read import Tensors
from fd_large.weights.settle import settle_model
from fd_large.weights.source import Sources
from fd_large.weights.stored_models import Stored

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
    section = FrozenModel(
        source=str(vit), statistics=(0.5,) * 6, architecture=Architecture(num_heads=(2,))
    )
    settled = settle_model(section, sources, where="--teacher.source")
    weights = dict(frozen_weights(settled, sources, where="--teacher.source"))
    assert weights.keys() == torch.load(vit, weights_only=True).keys()
    assert sources.path(settled.source) == vit
    assert reads == [str(vit)]
    sources.forget()
    sources.open(vit)
    assert len(reads) == 2


def test_files_of_a_library_too(tmp_path, reads):
    torch.save(build("timm:test_resnet").net.state_dict(), tmp_path / "resnet.pth")
    sources, model = Sources(), resolve("timm:test_resnet")
    for _ in range(2):
        assert len(dict(sources.fitted(str(tmp_path / "resnet.pth"), model))) > 20
    assert sources.path(str(tmp_path / "resnet.pth")) == tmp_path / "resnet.pth"
    assert len(reads) == 1


def test_what_is_no_file_is_asked_of_the_reader_once(tmp_path):
    """A run that trains on must not show a start two checkpoints."""
    asked = []
    model = resolve("dino_vit_base_patch16", VIT)
    net = scattered(build(model))

    def reader(path, where):
        asked.append(path)
        return Stored(tmp_path / "step_7", Tensors(net.state_dict()), model, IMAGENET, {})

    sources = Sources(reader)
    weights = sources.open(tmp_path / "run")
    assert (weights.source, weights.own) == (str(tmp_path / "step_7"), True)
    assert sources.open(weights.source) is weights
    assert sources.path(weights.source) == tmp_path / "step_7"
    assert asked == [tmp_path / "run"]


def test_nothing_at_all_is_still_one_sentence():
    run = teacher_run("", "clip_vit_base_patch16")
    with pytest.raises(ConfigError, match=r"--teacher\.source"):
        frozen_weights(run.teacher, Sources(), where="--teacher.source")
    assert (
        frozen_weights(
            teacher_run("random", "clip_vit_base_patch16").teacher,
            Sources(),
            where="--teacher.source",
        )
        is None
    )


def test_a_name_that_no_file_can_have(tmp_path):
    for source in ("x" * 300, f"{tmp_path}/{'x' * 300}#teacher"):
        for act in (inspect, teacher_run):
            with pytest.raises(WeightsError, match="more than 255 bytes"):
                act(source)
