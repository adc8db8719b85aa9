"""A source is resolved once a start, whatever it is: a file, a run, an export."""

from __future__ import annotations

import json

import pytest
import torch
from hub import hub
from loading import scattered, teacher_run
from safetensors.torch import save_file

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.engine.frozen import frozen_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.sections import FrozenModel, Student
from fd_large.weights import resolve as module
from fd_large.weights.inspection import inspect
from fd_large.weights.read import Tensors
from fd_large.weights.resolve import Sources, Stored
from fd_large.weights.settle import settle_model, settle_student
from fd_large.weights.sidecar import own_config

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
    assert sources.resolve(settled.source).path == vit
    assert reads == [str(vit)]
    sources.forget()
    assert sources.resolve(vit).published.form == "dino"
    assert len(reads) == 2


def test_files_of_a_library_too(tmp_path, reads):
    torch.save(build("timm:test_resnet").net.state_dict(), tmp_path / "resnet.pth")
    weights, model = Sources().resolve(tmp_path / "resnet.pth"), resolve("timm:test_resnet")
    for _ in range(2):
        assert len(dict(weights.fitted(model))) > 20
    assert weights.path == tmp_path / "resnet.pth"
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
    weights = sources.resolve(tmp_path / "run").published
    assert (weights.source, weights.own) == (str(tmp_path / "step_7"), True)
    assert sources.resolve(weights.source).published is weights
    assert sources.resolve(weights.source).path == tmp_path / "step_7"
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
            with pytest.raises(WeightsError, match="255 bytes"):
                act(source)


HELD = "timm:resnet18"


def test_an_export_that_only_its_config_describes_is_located_by_its_file(tmp_path):
    architecture = resolve("timm:resnet18")
    config = own_config(architecture, IMAGENET)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"encoder.bn1.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    weights = Sources().resolve(tmp_path)
    assert weights.unpublished.architecture == architecture
    assert weights.path == tmp_path / "model.safetensors"


def test_an_export_on_the_hub_is_that_export(tmp_path):
    folder, architecture = tmp_path / "net", resolve(HELD)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(own_config(architecture, IMAGENET)))
    save_file({"encoder.bn1.weight": torch.ones(64)}, folder / "model.safetensors")
    with hub({"someone/net": folder}, tmp_path / "cache"):
        sources = Sources()
        section = FrozenModel(source="hf:someone/net")
        settled = settle_model(section, sources, where="--teacher.source")
        assert resolve(settled.model, settled.architecture) == architecture
        assert settled.source == section.source
        assert sources.resolve(section.source).path.name == "model.safetensors"


@pytest.mark.parametrize("student", ["swinv2_tiny", "module:other.py:Net"])
def test_init_from_another_model_names_it(tmp_path, student):
    (tmp_path / "config.json").write_text(json.dumps(own_config(resolve(HELD), IMAGENET)))
    save_file({"bn1.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    section = Student(model=student, init=str(tmp_path))
    with pytest.raises(WeightsError, match=f"--student.model {HELD}"):
        settle_student(section, Sources())


def test_code_that_changed_since_the_export_is_told(tmp_path, caplog):
    code = tmp_path / "toy.py"
    code.write_text("class Toy: width = 8\n")
    toy = resolve(f"module:{code}:Toy")
    config = own_config(toy, IMAGENET, code_hash=doors.hashes(toy.code)[toy.code])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    assert Sources().resolve(tmp_path).stored.sizes == {"a": 64}
    assert not caplog.text
    code.write_text("class Toy: width = 9\n")
    assert Sources().resolve(tmp_path).stored.architecture == toy
    assert "toy.py:Toy is NOT THE FILE that made this model" in caplog.text
