"""The commands `weights inspect` and `weights convert`."""

from __future__ import annotations

import pytest
import torch
from loading import (
    IMAGES,
    TINY,
    close,
    loaded,
    made,
    scattered,
)
from safetensors.torch import load_file

from fd_large.backbones.registry import build
from fd_large.cli import main as cli
from fd_large.recipes.architectures import resolve
from fd_large.weights import fetch
from fd_large.weights.convert import write


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
    assert "cannot be written; got" in capsys.readouterr().err


def test_fetch_says_what_there_is_and_whether_it_teaches(tmp_path, capsys, monkeypatch):
    def fetched(source, out):
        write(made("dino_vit_base_patch16").named_parameters(), architecture, "fd", out)
        return ["config.json", "model.safetensors"], "mit"

    architecture = resolve("dino_vit_base_patch16", TINY["dino_vit_base_patch16"])
    monkeypatch.setattr(fetch, "fetch", fetched)
    assert cli.main(["weights", "fetch", "hf:some/one", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "config.json, model.safetensors; licence of the weights: mit" in said
    assert f"--teacher.source {tmp_path / 'out'}" in said
    monkeypatch.setattr(fetch, "fetch", lambda source, out: ([], "mit"))
    assert cli.main(["weights", "fetch", "hf:some/one", str(tmp_path / "none")]) == 0
    assert "not a teacher by itself: " in capsys.readouterr().out
