"""Whose weights: licences as something says them, and never a guess."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from fd_large.recipes.architectures import resolve
from fd_large.weights.origin import UNKNOWN, Origin, is_random, origin_of, without_folders

CLIP = "clip_vit_base_patch16"


def origin(source, model=CLIP):
    return origin_of(source, model, resolve(model))


def card(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ('tags:\n- a\nlicense: "mit"', "mit"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ("license: other\r\nlicense_name: a-licence\r", "a-licence"),
    ],
)
def test_the_card_beside_the_weights(tmp_path, metadata, licence):
    text = f"---\n{metadata}\n---\n\nlicense: gpl"
    folder = card(tmp_path / "model", text.replace("---\n", "---\r\n") if "\r" in text else text)
    said = Origin(f"{licence}, as the files beside them say")
    assert origin(str(folder)) == said
    assert origin(f"{folder / 'model.pth'}#teacher") == said


@pytest.mark.parametrize(
    ("config", "licence"),
    [
        ('{"pretrained_cfg": {"license": "cc-by-nc-4.0"}}', "cc-by-nc-4.0"),
        ('{"pretrained_cfg": {"license": ["mit"]}}', ""),
        ('{"pretrained_cfg": []}', ""),
        ("[", ""),
    ],
)
def test_timms_configuration_beside_the_weights(tmp_path, config, licence):
    (tmp_path / "config.json").write_text(config)
    said = f"{licence}, as the files beside them say" if licence else UNKNOWN
    assert origin(str(tmp_path), "vit_base_patch16") == Origin(said)


@pytest.mark.parametrize("text", ["license: mit", "---\ntags: []\n---\nlicense: mit", "", "---\n"])
def test_a_card_that_says_nothing(tmp_path, text):
    folder = card(tmp_path / "model", text)
    assert origin(str(folder), "vit_base_patch16") == Origin(UNKNOWN)


def test_a_file_is_only_perhaps_the_published_one(tmp_path):
    found = origin(str(tmp_path / "clip.pt"))
    assert found == Origin("MIT if they are those of github.com/openai/CLIP, else unknown")


def test_sources_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin("hf:group/model") == Origin(UNKNOWN, "group/model")
    folder = card(tmp_path / "cached", "---\nlicense: cc-by-4.0\n---\n")
    found = str(folder / "README.md")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: found)
    assert origin("hf:group/model") == Origin("cc-by-4.0", "group/model")
    assert origin("timm:convnextv2_atto") == Origin(
        "cc-by-nc-4.0", "timm/convnextv2_atto.fcmae_ft_in1k"
    )


def test_open_clips_weights(monkeypatch):
    config = {"hf_hub": "laion/some-clip/"}
    library = SimpleNamespace(get_pretrained_cfg=lambda architecture, tag: config)
    monkeypatch.setitem(sys.modules, "open_clip", library)
    assert origin("open_clip:ViT-B-16/tag") == Origin(UNKNOWN, "laion/some-clip")


@pytest.mark.parametrize("source", ["", "random", "timm:resnet18=random"])
def test_random_weights_have_none(source):
    assert is_random(source)
    assert "none" in origin(source).licence


def test_code_of_the_users_own_is_not_imported():
    assert origin("module:nowhere/net.py:Net") == Origin(UNKNOWN)


def test_no_folders_are_shown():
    shown = {
        "/home/me/clip.pt": "clip.pt",
        "hf:group/model": "hf:group/model",
        "module:/home/me/net.py:Net": "module:net.py:Net",
        "timm:resnet18": "timm:resnet18",
    }
    assert {source: without_folders(source) for source in shown} == shown
