"""The weights of a start are located and opened once."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from loading import (
    initial,
    loaded,
    scattered,
    teacher_run,
)
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import fd_swinv2, max_relative
from safetensors.torch import save_file

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.engine.frozen import frozen_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.sections import FrozenModel
from fd_large.weights import source as module
from fd_large.weights.coverage import Fitted
from fd_large.weights.inspection import inspect
from fd_large.weights.read import Tensors
from fd_large.weights.settle import settle_model
from fd_large.weights.sidecar import own_config
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


def test_an_export_that_only_its_config_describes_is_located_by_its_file(tmp_path):
    architecture = resolve("timm:resnet18")
    config = own_config(architecture, IMAGENET)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"encoder.bn1.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    sources = Sources()
    assert sources.own(str(tmp_path)).architecture == architecture
    assert sources.path(str(tmp_path)) == tmp_path / "model.safetensors"


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


FD_NETS = [
    "fd_swinv2_a",
    "fd_swinv2_b_shared_rpb",
    "fd_swinv2_c_window_shrinks",
    "swinv2_giant_like_a_endnorm",
    "fd_vit_shared_rpb_a",
    "fd_vit_shared_rpb_b_kbias",
    "fd_vit_shared_rpb_c_patch14",
    "fd_vit_block_rpb_ape",
    "fd_vit_no_cls",
]


@pytest.mark.parametrize("name", FD_NETS)
def test_fd_students_beside_their_teacher(name, tmp_path):
    """Under `model`, with decoder, teacher, and a settings object that is not to be run."""
    spec, tensors = oracle(name)
    width = spec["config"]["embed_dim"]
    state = OrderedDict((f"encoder.{n}", t) for n, t in weights_of(tensors).items())
    state |= {
        "decoder.0.weight": torch.zeros(8, width, 1),
        "decoder.0.bias": torch.zeros(8),
        "feature_model.visual.class_embedding": torch.zeros(8),
        "feature_model.visual.conv1.weight": torch.zeros(8, 3, 4, 4),
    }
    settings = argparse.Namespace(lr=1.0, nested=argparse.Namespace(a=[1, 2]))
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "config": settings, "epoch": 3},
        tmp_path / "ckpt.pth",
    )
    given = {}
    if "depths" in spec["config"]:
        # Keys do not tell it where the tables are not in the file.
        given = {"window_size": spec["config"]["window_size"]}
        stages = len(spec["config"]["depths"])
        given["pretrained_window_sizes"] = (0,) * stages
    net, _ = loaded(tmp_path / "ckpt.pth", **given)
    assert_matches(net, spec, tensors, "out.final")


@pytest.mark.parametrize("name", ["fd_training_run_clip_vit", "fd_training_run_esvit_swinv2"])
def test_an_fd_checkpoint_gives_student_projector_and_teacher(name, tmp_path):
    spec, tensors = oracle(name)
    torch.save({"model": weights_of(tensors), "epoch": 1}, tmp_path / "fd.pth")
    student, teacher = spec["config"]["student"], spec["config"]["teacher"]
    swin = "depths" in student
    given = {}
    if swin:
        given = {"window_size": student["window_size"]}
        given["pretrained_window_sizes"] = (0,) * len(student["depths"])
    net, _ = loaded(f"{tmp_path / 'fd.pth'}#student", **given)
    tolerance = 5e-5 if swin else 1e-5
    got = net(tensors["first.input"]).tokens
    expected = tensors["first.student_map"][:1]
    assert max_relative(got, expected) <= tolerance
    projector = Sources().open(f"{tmp_path / 'fd.pth'}#projector")
    found = {n: p.read(projector.file) for n, p in projector.pieces.items()}
    assert found.keys() == {"projection.weight", "projection.bias"}
    decoded = torch.nn.functional.linear(
        expected, found["projection.weight"], found["projection.bias"]
    )
    assert max_relative(decoded, tensors["first.decoded"][:1]) <= 1e-5
    given = {} if swin else {"num_heads": (teacher["heads"],)}
    taught, _ = loaded(f"{tmp_path / 'fd.pth'}#teacher", **given)
    images = tensors["first.input"]
    if not swin:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
        clip_mean, clip_std = (torch.tensor(v).view(1, 3, 1, 1) for v in OPENAI_CLIP)
        images = (images * std + mean - clip_mean) / clip_std
    target = whiten(taught(images).tokens, 1e-5)
    assert max_relative(target, tensors["first.target"][:1]) <= 2e-5


def test_a_student_starts_from_a_published_file(tmp_path):
    spec, tensors = oracle("fd_vit_shared_rpb_a")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    config = spec["config"]
    shape = Architecture(
        embed_dim=config["embed_dim"],
        depths=(config["depth"],),
        num_heads=(config["num_heads"],),
        patch_size=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    fields = {k: v for k, v in vars(replace(shape)).items() if v is not None}
    net, _ = initial(tmp_path / "fd.pth", "vit_base_patch16", config["img_size"], **fields)
    assert_matches(net, spec, tensors, "out.final")


def test_a_rectangular_net_is_filled_by_its_shapes(tmp_path):
    """No architecture of ours is rectangular, but the model and the loader are."""
    spec, tensors = oracle("fd_swinv2_d_rect_nonorm_ape")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    net = fd_swinv2(spec["config"])
    weights = Sources().open(tmp_path / "fd.pth")
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    pieces, _ = weights.adapted(weights.found, expected)
    net.load_state_dict(dict(Fitted(pieces, weights.file, expected, what="oracle")))
    assert_matches(net, spec, tensors, "out.final")


def test_a_name_that_no_file_can_have(tmp_path):
    for source in ("x" * 300, f"{tmp_path}/{'x' * 300}#teacher"):
        for act in (inspect, teacher_run):
            with pytest.raises(WeightsError, match="more than 255 bytes"):
                act(source)
