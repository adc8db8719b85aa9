"""Published numbers through the public loader, from files in their published wrapping."""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loading import initial, loaded
from oracles_models import fd_swinv2, max_relative
from safetensors.torch import load_file

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.backbones.windows import coordinate_table
from fd_large.errors import WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.kernels.window_attention_reference import position_index
from fd_large.recipes.architectures import Architecture
from fd_large.weights.coverage import Fitted
from fd_large.weights.source import Sources

FOLDER = Path(os.environ.get("FD_ORACLES", Path(__file__).resolve().parents[4] / "shared/oracles"))
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no oracles at {FOLDER}; set FD_ORACLES to their folder"
)


def oracle(name):
    spec = json.loads((FOLDER / f"{name}.json").read_text())
    return spec, load_file(FOLDER / f"{name}.safetensors")


def weights_of(tensors, prefix="weights.", buffers=True):
    found = OrderedDict(
        (n.removeprefix(prefix), t) for n, t in tensors.items() if n.startswith(prefix)
    )
    if buffers:
        found |= {n.removeprefix("buffers."): t for n, t in tensors.items() if n[:8] == "buffers."}
    return found


def check(net, spec, tensors, name, images=None):
    got = net(tensors["input"] if images is None else images).tokens
    if name == "out.whitened":
        got = whiten(got, 1e-5)
    assert max_relative(got, tensors[name]) <= spec["suggested_tolerance_max_rel"]


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
    check(net, spec, tensors, "out.final")


@pytest.mark.parametrize("name", ["swinv2_official_a", "swinv2_official_b_pretrained_window"])
def test_official_swinv2_tells_its_windows(name, tmp_path):
    spec, tensors = oracle(name)
    state = weights_of(tensors) | {"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(5)}
    config = spec["config"]
    side, table = config["img_size"] // config["patch_size"], config["window_size"]
    # The published files hold every stage's tables; the oracle holds a few.
    for s, pretrained in enumerate(config.get("pretrained_window_sizes", [0] * 4)):
        if s >= len(config["depths"]):
            break
        window = min(table, side // 2**s)
        made = coordinate_table(window, pretrained, torch.device("cpu"))
        n = 2 * window - 1
        for b in range(config["depths"][s]):
            at = f"layers.{s}.blocks.{b}.attn"
            state[f"{at}.relative_coords_table"] = made.view(1, n, n, 2)
            state[f"{at}.relative_position_index"] = position_index(
                window, window, False, torch.device("cpu")
            )
    torch.save({"model": state}, tmp_path / "swinv2.pth")
    net, teacher = loaded(tmp_path / "swinv2.pth")
    assert teacher.architecture.window_size == min(table, side)
    check(net, spec, tensors, "out.final")


def test_simmim_swinv2_encoder_map(tmp_path):
    """Through the loader with nothing masked, since the mask token belongs to pre-training."""
    spec, tensors = oracle("simmim_swinv2")
    torch.save({"model": weights_of(tensors)}, tmp_path / "simmim.pth")
    found = Sources().open(tmp_path / "simmim.pth")
    assert found.form == "simmim_swinv2"
    assert "encoder.mask_token" in found.dropped
    assert any(name.startswith("decoder.") for name in found.dropped)
    stages = len(spec["config"]["depths"])
    net, _ = loaded(
        tmp_path / "simmim.pth",
        window_size=spec["config"]["window_size"],
        pretrained_window_sizes=(0,) * stages,
    )
    mask, token = tensors["mask"].flatten(1)[..., None], tensors["weights.encoder.mask_token"]

    def masked(module, inputs, output):
        patches = output[0].flatten(1, 2)
        hidden = (patches * (1 - mask) + token * mask).view(output[0].shape)
        return hidden, hidden

    net.patch_embed.register_forward_hook(masked)
    got = net(tensors["input"]).tokens.transpose(1, 2)
    expected = tensors["out.encoder_map"]
    tolerance = spec["suggested_tolerance_max_rel"]
    assert max_relative(got.reshape(expected.shape), expected) <= tolerance


def clip_state(tensors):
    state = weights_of(tensors)
    return state | {
        "input_resolution": torch.tensor(48),
        "context_length": torch.tensor(7),
        "vocab_size": torch.tensor(9),
        "positional_embedding": torch.zeros(7, 8),
        "text_projection": torch.zeros(8, 4),
        "logit_scale": torch.zeros(()),
        "token_embedding.weight": torch.zeros(9, 8),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        "ln_final.weight": torch.zeros(8),
    }


def test_openai_clip_with_its_text_tower(tmp_path):
    spec, tensors = oracle("fd_teacher_clip")
    torch.save(clip_state(tensors), tmp_path / "clip.pt")
    net, teacher = loaded(tmp_path / "clip.pt", num_heads=(spec["config"]["heads"],))
    assert teacher.architecture.activation == "quick_gelu"
    assert teacher.statistics == (*OPENAI_CLIP.mean, *OPENAI_CLIP.std)
    check(net, spec, tensors, "out.post_norm", images=tensors["out.clip_input"])
    check(net, spec, tensors, "out.whitened", images=tensors["out.clip_input"])


@pytest.mark.parametrize("wrapping", ["bare", "teacher", "student"])
def test_dino(wrapping, tmp_path):
    spec, tensors = oracle("fd_teacher_dino")
    state = weights_of(tensors)
    if wrapping != "bare":
        head = {"head.mlp.0.weight": torch.zeros(1)}
        other = {f"module.backbone.{n}": t + 1 for n, t in state.items()}
        prefix = "backbone." if wrapping == "teacher" else "module.backbone."
        mine = {f"{prefix}{n}": t for n, t in state.items()}
        mine |= {f"{prefix.removesuffix('backbone.')}{n}": t for n, t in head.items()}
        whole = {"student": other, "teacher": other, "args": argparse.Namespace(lr=1), "epoch": 3}
        state = whole | {wrapping: mine}
    torch.save(state, tmp_path / "dino.pth")
    part = "" if wrapping == "bare" else f"#{wrapping}"
    net, teacher = loaded(
        f"{tmp_path / 'dino.pth'}{part}", num_heads=(spec["config"]["num_heads"],)
    )
    assert teacher.architecture.norm_eps == 1e-6
    check(net, spec, tensors, "out.whitened")


@pytest.mark.parametrize("name", ["fd_teacher_deit", "fd_teacher_deit_distilled"])
def test_deit_with_its_heads(name, tmp_path, caplog):
    spec, tensors = oracle(name)
    distilled = spec["config"]["distilled"]
    heads = {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    if distilled:
        heads |= {"head_dist.weight": torch.zeros(3, 32), "head_dist.bias": torch.zeros(3)}
    torch.save({"model": weights_of(tensors) | heads}, tmp_path / "deit.pth")
    given = {"num_heads": (spec["config"]["num_heads"],)}
    with caplog.at_level("INFO"):
        net, _ = loaded(tmp_path / "deit.pth", keep_distillation_token=True, **given)
    assert ("distillation token is kept" in caplog.text) == distilled
    assert "100%" in caplog.text
    check(net, spec, tensors, "out.whitened")
    if distilled:
        with caplog.at_level("INFO"):
            net, _ = loaded(tmp_path / "deit.pth", **given)
        assert "distillation token is dropped from" in caplog.text
        tokens, whole = net(tensors["input"]).tokens, tensors["out.post_norm"]
        expected = torch.cat([whole[:, :1], whole[:, 2:]], dim=1)
        assert max_relative(tokens, expected) <= spec["suggested_tolerance_max_rel"]


@pytest.mark.parametrize("name", ["fd_teacher_esvit", "fd_teacher_esvit_s3"])
def test_esvit_under_student_and_module(name, tmp_path):
    spec, tensors = oracle(name)
    state = weights_of(tensors) | {
        "head.mlp.0.weight": torch.zeros(1),
        "head_dense.last_layer.weight_g": torch.zeros(1),
    }
    student = {f"module.{n}": t for n, t in state.items()}
    file = {"student": student, "teacher": {n: t + 1 for n, t in student.items()}, "epoch": 3}
    torch.save(file, tmp_path / "esvit.pth")
    assert Sources().open(tmp_path / "esvit.pth").form == "esvit"
    net, teacher = loaded(tmp_path / "esvit.pth")
    assert teacher.statistics == (*IMAGENET.mean, *IMAGENET.std)
    check(net, spec, tensors, "out.whitened")


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
    check(net, spec, tensors, "out.final")


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
    check(net, spec, tensors, "out.final")


def test_norms_inside_the_mlp_are_named_as_left_over(tmp_path):
    _, tensors = oracle("swinv2_giant_like_b_endnorm_mlpnorm")
    state = {f"encoder.{n}": t for n, t in weights_of(tensors).items()}
    torch.save({"model": state}, tmp_path / "fd.pth")
    with pytest.raises(WeightsError, match=r"left over: layers\.1\.blocks\.0\.mlp\.norm"):
        loaded(tmp_path / "fd.pth", window_size=4, pretrained_window_sizes=(0, 0))
