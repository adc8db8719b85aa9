"""A student, its teacher and its projector are opened out of one file."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import pytest
import torch
from loading import loaded
from oracle_files import assert_matches, oracle, weights_of
from oracles_models import max_relative

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.errors import WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.weights.source import Sources

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


def test_a_projector_is_no_net(tmp_path):
    state = {
        "encoder.blocks.0.attn.q_bias": torch.zeros(1),
        "decoder.0.weight": torch.zeros(2, 1, 1),
    }
    torch.save({"model": state}, tmp_path / "fd.pth")
    assert Sources().open(f"{tmp_path / 'fd.pth'}#projector").pieces.keys() == {"projection.weight"}
    with pytest.raises(WeightsError, match=r"no such part.*got #teacher.*expected .*#projector"):
        Sources().open(f"{tmp_path / 'fd.pth'}#teacher")
