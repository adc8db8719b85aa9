"""What is seen of a model of timm before it is trained: its layers, and what cannot be trained."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import register_model
from timm.optim import param_groups_layer_decay
from tiny_timm import tiny

from fd_large.backbones.timm.timm_backbone import TimmBackbone
from fd_large.engine.student import make_student
from fd_large.errors import ConfigError, FDError
from fd_large.recipes.sections import Student

DECAY = 0.7


@register_model
def vit_that_drops_patches(pretrained: bool = False, **arguments):
    return timm.create_model("test_vit", patch_drop_rate=0.25, **arguments)


@register_model
def vit_that_forgets(pretrained: bool = False, **arguments):
    net = timm.create_model("test_vit", **arguments)
    net.spare = torch.nn.Parameter(torch.zeros(3))
    return net


def exempt_in(whole):
    return whole.no_weight_decay() if hasattr(whole, "no_weight_decay") else ()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (tiny("convnextv2_atto"), 0),
        ("test_vit", 64),
        (tiny("swin_tiny_patch4_window7_224"), 64),
        (tiny("eva02_tiny_patch14_224"), 56),
        ("hiera_tiny_224", 0),
    ],
)
def test_layers_and_weight_decay_are_timms(name, size):
    with torch.device("meta"):
        net = TimmBackbone(name, image_size=size, is_trained=True)
        whole = timm.create_model(name, num_classes=10)
    groups = param_groups_layer_decay(
        whole, 0.05, no_weight_decay_list=exempt_in(whole), layer_decay=DECAY
    )
    names = {id(p): n for n, p in whole.named_parameters()}
    theirs = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    exempt = net.no_weight_decay()
    for name, parameter in net.named_parameters():
        scale, decay = theirs[name.removeprefix("net.")]
        assert DECAY ** (net.last_layer - net.layer_id(name)) == pytest.approx(scale, rel=1e-12)
        assert (name in exempt or parameter.dim() <= 1) == (decay == 0), name


def test_a_model_without_a_head_leaves_a_layer_for_one():
    with torch.device("meta"):
        net = TimmBackbone("vit_small_patch14_reg4_dinov2", image_size=56, is_trained=True)
    assert net.layer_id("net.norm.weight") == net.last_layer - 1


@pytest.mark.parametrize(
    ("name", "rate", "field"),
    [
        ("convnext_attoo", 0.1, "^model: .*convnext_atto"),
        ("vit_that_forgets", 0.1, r"student.model: .*does not depend on all .*\(spare"),
        ("vit_that_drops_patches", 0.1, "student.model: .*bernoulli|rand"),
        ("test_vit", 0.1, "does not accept .*8x8 pixels"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(name, rate, field):
    size = 8 if "8x8 pixels" in field else 0
    with pytest.raises(FDError, match=field), torch.device("meta"):
        TimmBackbone(name, image_size=size, drop_path_rate=rate, is_trained=True)


def test_batch_norms_without_groups_need_weights_to_start_from():
    make_student(Student(model="timm:resnet18"))
    with pytest.raises(ConfigError, match=r"^student\.norm_batch: .*--student\.init"):
        make_student(Student(model="timm:resnet18", norm_batch=0))


def test_a_model_without_drop_path_is_trained_without():
    with torch.device("meta"):
        net = TimmBackbone("vgg11", drop_path_rate=0.1, is_trained=True)
    assert net.drop_path_rates == ()


def test_the_smallest_map_of_a_batch_norm_is_known():
    with torch.device("meta"):
        small, large = (
            TimmBackbone("resnet18", image_size=size, is_trained=True) for size in (32, 64)
        )
    assert (small.fewest_places, large.fewest_places) == (1, 4)


def test_dropout_that_a_model_has_by_default_is_off():
    net = TimmBackbone("vit_relpos_small_patch16_224", drop_path_rate=0.1, is_trained=True)
    assert all(m.p == 0 for m in net.modules() if isinstance(m, torch.nn.Dropout))


def test_drop_paths_that_are_never_called_have_no_row():
    with torch.device("meta"):
        net = TimmBackbone("hgnet_tiny", drop_path_rate=0.1, is_trained=True)
    keep = torch.ones(len(net.drop_path_rates), 2, dtype=torch.bool)
    assert net(torch.empty(2, 3, 64, 64, device="meta"), keep).tokens.shape[:2] == (2, 4)


def test_blocks_that_are_given_a_growing_list_are_not_computed_again():
    with torch.device("meta"):
        assert TimmBackbone("rdnet_tiny", is_trained=True).blocks() == []
