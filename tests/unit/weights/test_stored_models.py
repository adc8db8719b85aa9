"""Models that this project stored: where they are, what they hold, and whose code made them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fd_large import doors
from fd_large.backbones.statistics import IMAGENET
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.sections import Student
from fd_large.weights.settle import settle_student
from fd_large.weights.sidecar import own_config
from fd_large.weights.source import Sources
from fd_large.weights.stored_models import exported

HELD = "timm:resnet18"


def test_an_export_that_only_its_config_describes_is_located_by_its_file(tmp_path):
    architecture = resolve("timm:resnet18")
    config = own_config(architecture, IMAGENET)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"encoder.bn1.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    sources = Sources()
    assert sources.own(str(tmp_path)).architecture == architecture
    assert sources.path(str(tmp_path)) == tmp_path / "model.safetensors"


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
    assert exported(tmp_path, "--teacher.source").sizes == {"a": 64}
    assert not caplog.text
    code.write_text("class Toy: width = 9\n")
    assert exported(tmp_path, "--teacher.source").architecture == toy
    assert "toy.py:Toy is NOT THE FILE that made this model" in caplog.text
