from __future__ import annotations

import subprocess
import sys

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes.architectures import ARCHITECTURES, FIELDS, Architecture, resolve


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_of_the_family_is_set(name):
    architecture = resolve(name)
    for field in FIELDS[architecture.family]:
        assert getattr(architecture, field) is not None, field
    for field in set(Architecture.__dataclass_fields__) - FIELDS[architecture.family]:
        assert getattr(architecture, field) is None, field


def test_overrides_replace_single_fields():
    a = resolve("swinv2_giant", Architecture(window_size=6, depths=(2, 2, 6, 2)))
    assert (a.window_size, a.depths, a.embed_dim, a.extra_norm_every) == (6, (2, 2, 6, 2), 512, 6)


def test_fewer_stages_need_fewer_heads():
    with pytest.raises(ConfigError, match=r"num_heads.*3 numbers"):
        resolve("swinv2_base", Architecture(depths=(2, 2, 6)))
    a = resolve("swinv2_base", Architecture(depths=(2, 2), num_heads=(4, 8)))
    assert a.pretrained_window_sizes == (0, 0)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match="nearest: swinv2_giant"):
        resolve("swinv2_gaint")


@pytest.mark.parametrize(
    ("name", "override", "match"),
    [
        ("swinv2_base", Architecture(layer_scale=0.1), "swinv2 model without that option"),
        ("vit_base_patch16", Architecture(window_size=7), "vit model without that option"),
        ("vit_base_patch16", Architecture(family="swin"), "family"),
        ("vit_base_patch16", Architecture(depths=(6, 6)), "one number for a ViT"),
        ("swinv2_base", Architecture(embed_dim=98), "divisors of width 98"),
        ("swinv2_base", Architecture(qkv_bias="fused"), "qkv_bias"),
        ("swinv2_base", Architecture(pretrained_window_sizes=(12,)), "4 numbers"),
        ("swinv2_base", Architecture(window_size=0), "positive whole number"),
        ("swinv2_base", Architecture(timm_name="resnet50"), "swinv2 model without that option"),
        ("timm", Architecture(embed_dim=8), "timm model without that option"),
        ("timm", Architecture(feature_stride=0), "feature_stride"),
    ],
)
def test_misfits_are_named(name, override, match):
    with pytest.raises(ConfigError, match=match):
        resolve(name, override)


def test_no_torch_is_imported():
    code = "import sys, fd_large.recipes.architectures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
