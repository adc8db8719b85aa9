from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes.architectures import (
    ARCHITECTURES,
    FAMILIES,
    Architecture,
    field_names,
    full_name,
    overrides,
    resolve,
    whole,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_section_has_every_field_of_a_family(family):
    known = {f.name: f.default for f in fields(Architecture)}
    assert all(known[name] is None for name in ("family", *field_names(family)))
    for name in field_names(family):
        assert f"\n    {name}: " in Architecture.__doc__


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_told_whole_by_its_own_values(name):
    named = resolve(name)
    assert named == ARCHITECTURES[name] == whole(named.values())
    assert overrides(named, named) == Architecture()
    assert resolve(named.family, overrides(named)) == named
    assert named.example in ARCHITECTURES


@pytest.mark.parametrize(
    ("model", "architecture", "name"),
    [
        ("vit_base_patch16", {"depths": [2]}, "vit_base_patch16"),
        ("timm", {"timm_name": "resnet18", "image_size": 64}, "timm:resnet18"),
        ("swinv2", overrides(resolve("swinv2_base")).__dict__, "swinv2_base"),
        ("swinv2", {"a field of": "another version"}, "swinv2"),
        ("module:a.py:Net", {}, "module:a.py:Net"),
    ],
)
def test_the_full_name_of_a_stored_model(model, architecture, name):
    section = {"model": model, "architecture": architecture}
    assert full_name(section) == name


def test_a_section_travels_between_ranks():
    section = Architecture(depths=(2, 2))
    assert pickle.loads(pickle.dumps(section)) == section


def test_overrides_replace_single_fields():
    a = resolve("swinv2_giant", Architecture(window_size=6, depths=(2, 2, 6, 2)))
    assert (a.window_size, a.depths, a.embed_dim, a.extra_norm_every) == (6, (2, 2, 6, 2), 512, 6)


def test_fewer_stages_need_fewer_heads():
    with pytest.raises(ConfigError, match=r"num_heads.*3 numbers"):
        resolve("swinv2_base", Architecture(depths=(2, 2, 6)))
    a = resolve("swinv2_base", Architecture(depths=(2, 2), num_heads=(4, 8)))
    assert a.pretrained_window_sizes == (0, 0)


@pytest.mark.parametrize(
    ("name", "given", "field"),
    [
        ("swinv2_base", Architecture(layer_scale=0.1), "layer_scale"),
        ("swinv2_base", Architecture(embed_dim=98), "num_heads"),
        ("swinv2_base", Architecture(qkv_bias="fused"), "qkv_bias"),
        ("swinv2_base", Architecture(pretrained_window_sizes=(12,)), "pretrained_window_sizes"),
        ("swinv2_base", Architecture(window_size=0), "window_size"),
        ("swinv2_base", Architecture(timm_name="resnet50"), "timm_name"),
        ("swin_base_esvit", Architecture(qkv_bias="qv"), "qkv_bias"),
        ("vit_base_patch16", Architecture(window_size=7), "window_size"),
        ("vit_base_patch16", Architecture(family="swin"), "family"),
        ("vit_base_patch16", Architecture(depths=(6, 6)), "depths"),
        ("vit_base_patch16", Architecture(distillation_token=True), "distillation_token"),
        ("vit_base_patch16", Architecture(qkv_bias="q"), "qkv_bias"),
        ("vit_base_patch16", Architecture(activation="quickgelu"), "activation"),
        ("timm", Architecture(embed_dim=8), "embed_dim"),
        ("timm", Architecture(feature_stride=-1), "feature_stride"),
        ("module", Architecture(function="no_colon"), "function"),
    ],
)
def test_misfits_name_the_field(name, given, field):
    with pytest.raises(ConfigError, match=rf"architecture\.{field}"):
        resolve(name, given)


def test_unknown_names_and_families_give_the_nearest():
    with pytest.raises(ConfigError, match="nearest: swinv2_giant"):
        resolve("swinv2_gaint")
    with pytest.raises(ConfigError, match="nearest: swinv2"):
        whole({**resolve("swinv2_tiny").values(), "family": "swinv3"})


def test_a_family_alone_asks_for_every_field():
    with pytest.raises(ConfigError, match="window_size"):
        resolve("swin", Architecture(embed_dim=8))


def test_the_size_of_the_images_reaches_only_what_depends_on_it():
    swinv2 = resolve("swinv2_tiny")
    assert resolve("vit_base_patch16").at(64).image_size == 64
    assert swinv2.at(64).image_size == 64
    fixed = replace(swinv2, absolute_position=True)
    assert (fixed.at(64), fixed.fixed_image_size, swinv2.fixed_image_size) == (fixed, 224, 0)
    assert resolve("swin_base_esvit").at(64).image_size == 224


def test_no_torch_is_imported():
    code = "import sys, fd_large.recipes.architectures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
