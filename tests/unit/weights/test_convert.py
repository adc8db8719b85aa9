from __future__ import annotations

import pytest
import torch
from loading import (
    IMAGES,
    TINY,
    loaded,
    made,
)

from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.architectures import resolve
from fd_large.weights import convert
from fd_large.weights.convert import write
from fd_large.weights.inspection import inspect


@pytest.mark.parametrize("name", TINY)
def test_our_own_export_tells_everything(tmp_path, name):
    net, architecture = made(name), resolve(name, TINY[name])
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


@pytest.mark.parametrize("fails", ["save_file", "write_json"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, fails):
    """So that the same command can be given again."""
    net, architecture = made("swinv2_huge"), resolve("swinv2_huge", TINY["swinv2_huge"])
    full = RuntimeError("no room")

    def fail(*arguments, **options):
        raise full

    with monkeypatch.context() as broken:
        broken.setattr(convert, fails, fail)
        with pytest.raises(WeightsError, match="no room"):
            write(net.state_dict().items(), architecture, "fd", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
    assert write(net.state_dict().items(), architecture, "fd", tmp_path / "net").is_file()


def test_nothing_is_overwritten_or_guessed(tmp_path):
    net, architecture = made("swinv2_huge"), resolve("swinv2_huge", TINY["swinv2_huge"])
    (tmp_path / "there.pth").touch()
    for to, out, words in (
        ("official", "net", "unknown kind of file"),
        ("timm", "net.pth", "no norms on the main path"),
        ("onnx", "net.pth", "unknown format"),
    ):
        with pytest.raises(WeightsError, match=words):
            write(net.state_dict().items(), architecture, to, tmp_path / out)
    with pytest.raises(ConfigError, match="got a file"):
        write(net.state_dict().items(), architecture, "fd", tmp_path / "there.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.pth"]
