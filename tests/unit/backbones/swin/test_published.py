"""Published files of Swin: the same features as the implementation that wrote them."""

from __future__ import annotations

import pytest
import torch
from loading import (
    IMAGES,
    TIMM_SWIN,
    close,
    loaded,
    opened,
    saved,
    scattered,
    tokens,
)
from oracle_files import assert_matches, oracle, weights_of
from timm.models.swin_transformer import SwinTransformer

from fd_large.backbones.statistics import IMAGENET
from fd_large.errors import WeightsError


def test_swin_of_timm(tmp_path):
    theirs = scattered(SwinTransformer(**TIMM_SWIN, num_classes=3))
    path = saved(theirs, tmp_path / "swin.pth")
    assert opened(path).form == "timm_swin"
    net, _ = loaded(path)
    close(net(IMAGES).tokens, tokens(theirs))


def test_swin_of_transformers(transformers, tmp_path):
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4
    )
    model = scattered(transformers.SwinModel(config))
    model.save_pretrained(tmp_path)
    net, _ = loaded(tmp_path)
    with torch.no_grad():
        close(net(IMAGES).tokens, model(pixel_values=IMAGES).last_hidden_state)


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
    assert opened(tmp_path / "esvit.pth").form == "esvit"
    net, teacher = loaded(tmp_path / "esvit.pth")
    assert teacher.statistics == (*IMAGENET.mean, *IMAGENET.std)
    assert_matches(net, spec, tensors, "out.whitened")


def test_swin_of_simmim(tmp_path):
    theirs = scattered(SwinTransformer(**TIMM_SWIN, num_classes=0))
    net, _ = loaded(saved(theirs, tmp_path / "swin.pth"))
    state = {f"encoder.{name}": tensor for name, tensor in net.state_dict().items()}
    state["encoder.mask_token"] = torch.ones(1, 1, 16)
    state["decoder.0.weight"] = torch.ones(2, 2, 1, 1)
    torch.save({"model": state}, tmp_path / "simmim.pth")
    assert opened(tmp_path / "simmim.pth").form == "simmim_swin"
    same, teacher = loaded(tmp_path / "simmim.pth")
    assert teacher.statistics == (*IMAGENET.mean, *IMAGENET.std)
    close(same(IMAGES).tokens, tokens(theirs))


def test_windows_that_grow_are_another_model(tmp_path):
    theirs = scattered(SwinTransformer(**TIMM_SWIN, num_classes=0))
    path = saved(theirs, tmp_path / "swin.pth")
    state = torch.load(path)
    for name in [n for n in state if n.startswith("layers.0") and n.endswith("bias_table")]:
        state[name] = state[name][:9]
    torch.save(state, path)
    with pytest.raises(WeightsError, match="larger window"):
        loaded(path)
