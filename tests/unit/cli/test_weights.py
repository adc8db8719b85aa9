"""`weights inspect` and `weights convert`, and what they write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from loading import close, loaded, scattered
from safetensors.torch import load_file

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.backbones.windows import coordinate_table
from fd_large.cli import main as cli
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.weights.convert import write
from fd_large.weights.inspection import inspect
from fd_large.weights.source import Sources

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
VIT = Architecture(embed_dim=32, depths=(2,), num_heads=(2,), patch_size=8, image_size=32)
SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, patch_size=2, image_size=32
)
NETS = {
    "vit_base_patch16": VIT,
    "dino_vit_base_patch16": VIT,
    "clip_vit_base_patch16": VIT,
    "swinv2_huge": replace(SWIN, extra_norm_every=2),
    "swin_base_esvit": SWIN,
}


def made(name):
    return scattered(build(name, NETS[name], initialization="official", seed=0))


@pytest.mark.parametrize("name", NETS)
def test_our_own_export_tells_everything(tmp_path, name):
    net, architecture = made(name), resolve(name, NETS[name])
    file = write(
        net.state_dict().items(), architecture, "fd", tmp_path / "net", statistics=OPENAI_CLIP
    )
    assert file == tmp_path / "net" / "model.safetensors"
    for source in (file, file.parent):
        got, teacher = loaded(source)
        assert teacher.statistics == (*OPENAI_CLIP.mean, *OPENAI_CLIP.std)
        for field, value in vars(architecture).items():
            if field not in ("image_size", "pretrained_window_sizes"):
                assert getattr(teacher.architecture, field) == value, field
        assert torch.equal(got(IMAGES).tokens, net(IMAGES).tokens)
    found = inspect(file.parent)
    assert found.own
    assert not found.unknown
    assert not found.match.complaints
    assert found.parameters == sum(p.numel() for p in net.parameters())


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
    v2 = scattered(build("swinv2_base", SWIN, initialization="official", seed=0))
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
    assert "0% of the model's 86,917,944 parameters" in capsys.readouterr().out


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


def test_official_files_tell_windows_and_image_size(tmp_path):
    net = build("swinv2_base", SWIN, initialization="official", seed=0)
    state = net.state_dict()
    for stage, window, pretrained in ((0, 4, 3), (1, 4, 2)):
        at = f"layers.{stage}.blocks.0.attn.relative_coords_table"
        made_table = coordinate_table(window, pretrained, torch.device("cpu"))
        state[at] = made_table.view(1, 7, 7, 2)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    torch.save({"model": state}, tmp_path / "v2.pth")
    found = Sources().open(tmp_path / "v2.pth").found
    assert (found.window_size, found.pretrained_window_sizes) == (4, (3, 2))
    assert found.image_size == 32


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["inspec"], "nearest: inspect"),
        (["inspect"], "SOURCE"),
        (["inspect", "a", "b"], "b"),
        (["inspect", "a", "--colour", "red"], "--colour"),
        (["convert", "a", "--to", "onnx", "b"], "--to"),
        (["convert", "a", "--to", "fd"], "OUT"),
    ],
)
def test_a_mistake_names_the_argument(words, found, capsys):
    assert cli.main(["weights", *words]) == 2
    assert found in capsys.readouterr().err


def test_nothing_is_overwritten_or_guessed(tmp_path):
    net, architecture = made("swinv2_huge"), resolve("swinv2_huge", NETS["swinv2_huge"])
    (tmp_path / "there.pth").touch()
    for to, out, words in (
        ("fd", "there.pth", "something is there already; got a file"),
        ("official", "net", "unknown kind of file"),
        ("timm", "net.pth", "no norms on the main path"),
        ("onnx", "net.pth", "no such format"),
    ):
        with pytest.raises(WeightsError, match=words):
            write(net.state_dict().items(), architecture, to, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.pth"]


def test_a_damaged_config_is_named(tmp_path):
    net, architecture = made("vit_base_patch16"), resolve("vit_base_patch16", VIT)
    write(net.state_dict().items(), architecture, "fd", tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: not JSON"):
        Sources().open(tmp_path / "net")
    bad = {"fd_large": {"architecture": {"colour": 1}}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(bad))
    with pytest.raises(WeightsError, match="fields of no architecture"):
        Sources().open(tmp_path / "net")


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    net = made("vit_base_patch16")
    torch.save({f"encoder.{n}": t for n, t in net.state_dict().items()}, tmp_path / "fd.pth")
    below_a_file = tmp_path / "fd.pth" / "out.pth"
    words = ["weights", "convert", str(tmp_path / "fd.pth"), "--to", "official", str(below_a_file)]
    assert cli.main(words) == 2
    assert "cannot be written; got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        {"fd_large": 3},
        {"fd_large": {"architecture": ["embed_dim"]}},
        {"architecture": "vit_base_patch16_224", "pretrained_cfg": None},
    ],
)
def test_a_malformed_configuration_is_one_sentence(config, tmp_path):
    torch.save(made("vit_base_patch16").state_dict(), tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"not what its format has|config"):
        Sources().open(tmp_path / "net.pth")
