"""What a mask does not go with is refused with its reason, all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError, check_all
from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.masked.checks import mask_checks
from fd_large.tasks.distillation.section import Mask, NamedTeacher

VISIBLE: dict[str, Any] = {"sampler": "random", "student": "dropped", "tokens": "visible"}
DECODED: dict[str, Any] = {"sampler": "random", "student": "dropped"}
TOKEN: dict[str, Any] = {"sampler": "block", "min_patches": 4}


def vit(**options: Any) -> ViT:
    return ViT(16, 1, 2, patch_size=8, image_size=32, **options)


def swin() -> SwinV2:
    return SwinV2(8, (1, 1), (1, 2), window_size=4)


def check(
    mask: Mask,
    student: Any = vit,
    sizes: tuple[int, ...] = (),
    rule: str = "fixed",
    **entry: Any,
) -> None:
    def made() -> torch.nn.Module:
        with torch.device("meta"):
            return student()

    entries = {"a": NamedTeacher(model="clip_vit_base_patch16", **entry)}
    numbers = {"image_size": 32, "image_sizes": sizes, "rule": rule}
    check_all(*mask_checks(mask, made, entries, KNOWN.loss_of, **numbers))


@pytest.mark.parametrize(
    ("mask", "others"),
    [
        (TOKEN, {"student": swin, "head": "ladder"}),
        (TOKEN, {"loss": "0.5 cosine + 0.5 mse", "interpolation": "bilinear"}),
        ({**TOKEN, "tokens": "all", "cls": True}, {"loss": "relation"}),
        (TOKEN, {"loss": "relation", "targets": ("summary",)}),
        (VISIBLE, {"head": "mlp"}),
        ({**TOKEN, "cls": True, "reduce": "image"}, {"rule": "drop"}),
        ({**TOKEN, "cls": True, "sampler": "random"}, {"rule": "drop"}),
        (DECODED, {"head": "block"}),
        ({}, {"loss": "relation", "sizes": (32, 64), "student": torch.nn.Identity}),
    ],
)
def test_what_goes_together_passes(mask, others):
    check(Mask(**mask), **others)


@pytest.mark.parametrize(
    ("mask", "others", "words"),
    [
        ({**TOKEN, "cls": True}, {"rule": "drop"}, r"mask\.cls: .* weighting\.rule drop"),
        (TOKEN, {"student": torch.nn.Identity}, r"mask\.student: .* got token for a Identity"),
        (VISIBLE, {"student": swin}, r"mask\.student: visible.*SwinV2.*or token"),
        (VISIBLE, {"student": lambda: vit(relative_position="block")}, r"mask\.student: visible"),
        ({**TOKEN, "ratio": 0.01}, {}, r"mask\.ratio.*0 in number"),
        ({**TOKEN, "min_patches": 7}, {}, r"mask\.min_patches.*7 beside 6.*at most 6"),
        ({**VISIBLE, "ratio": 0.99}, {}, r"mask\.ratio.*16 in number"),
        ({**TOKEN, "ratio_to": 0.99}, {}, r"mask\.ratio.*to 0\.99, 16"),
        ({**TOKEN, "sampler": "random", "share": 0.5, "cls": True}, {"rule": "drop"}, r"mask\.cls"),
        (TOKEN, {"loss": "relation"}, r"teachers\.a\.loss.*single tokens.*relation"),
        (TOKEN, {"loss": "cls_and_patches"}, r"teachers\.a\.loss"),
        (TOKEN, {"head": "convolutional"}, r"teachers\.a\.head"),
        (VISIBLE, {"head": "block"}, r"teachers\.a\.head.*linear, mlp, mlp_relu"),
        (DECODED, {"head": "ladder"}, r"teachers\.a\.head"),
        (TOKEN, {"interpolation": "bilinear_student"}, r"teachers\.a\.interpolation"),
        (TOKEN, {"sizes": (32, 64)}, r"data\.image_sizes"),
    ],
)
def test_what_does_not_go_together_is_refused(mask, others, words):
    with pytest.raises(ConfigError, match=words):
        check(Mask(**mask), **others)


def test_all_is_told_at_once():
    with pytest.raises(ConfigError) as found:
        check(Mask(**VISIBLE), swin, (32, 64), loss="relation", head="block")
    fields = ("data.image_sizes", "mask.student", "teachers.a.loss")
    assert all(field in str(found.value) for field in fields)


def test_fields_that_do_not_go_together_are_refused_by_themselves():
    with pytest.raises(ConfigError, match=r"mask\.sampler"):
        Mask(sampler="block", student="dropped")
    for fields in ({"ratio_to": 0.8}, {"share": 0.5}):
        with pytest.raises(ConfigError, match=r"mask\.sampler: .*mask\.ratio_to"):
            Mask(sampler="random", student="dropped", **fields)
    for fields in ({"ratio": 0.4, "ratio_to": 0.4}, {"ratio_to": 1.0}, {"share": 0.0}):
        with pytest.raises(ConfigError, match=r"mask\.(ratio_to|share): "):
            Mask(**fields)
    with pytest.raises(ConfigError, match=r"mask\.decoder_width"):
        Mask(decoder_width=100, decoder_heads=16)
    with pytest.raises(ConfigError, match=r"mask\.ratio"):
        Mask(ratio=1.0)


def test_fields_without_effect_are_named():
    assert list(Mask(sampler="block").ignored_fields()) == [
        "mask.decoder_width",
        "mask.decoder_depth",
        "mask.decoder_heads",
    ]
    # Who wants a mask and forgot how it is drawn is not to leave out its ratio.
    assert "--mask.sampler" in Mask().ignored_fields()["mask.ratio"]
    assert list(Mask(**DECODED).ignored_fields()) == ["mask.min_patches"]
