import sys
import types
from dataclasses import replace

import fused_adam
import pytest
import torch
from deepspeed.ops.adam import FusedAdam

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.zero import optimizer as module
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.task import Distillation

OPTIM = registry.get("fd_swinv2_base").optim


def _task():
    net = SwinV2(8, (1, 1), (1, 2), window_size=4)
    return Distillation(net, {"": lambda images: None}, [make_target(net.width, 6)])


def test_two_groups_as_published():
    task = _task()
    names = {id(p): n for n, p in task.named_parameters()}
    decay, no_decay = module.parameter_groups(task, 0.05)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    decayed = {names[id(p)] for p in decay["params"]}
    assert "projection.weight" in decayed
    assert "student.layers.0.downsample.reduction.weight" in decayed
    assert not any("cpb_mlp" in n or "logit_scale" in n or n.endswith("bias") for n in decayed)
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


def test_frozen_parameters_are_in_no_group():
    task = _task()
    task.student.patch_embed.requires_grad_(False)
    groups = module.parameter_groups(task, 0.05)
    held = {id(p) for group in groups for p in group["params"]}
    assert not held & {id(p) for p in task.student.patch_embed.parameters()}


def test_on_the_host_torch_serves_and_others_are_refused_by_name():
    groups = module.parameter_groups(_task(), 0.05)
    assert isinstance(module.make_optimizer(groups, OPTIM, on_gpu=False), torch.optim.AdamW)
    with pytest.raises(ConfigError, match="host memory"):
        module.make_optimizer(groups, replace(OPTIM, fused="apex"), on_gpu=False)


def test_apex_is_called_as_its_interface_says_with_a_stand_in(monkeypatch):
    """A stand-in, since NVIDIA's apex is on no index; the other project of that name is refused."""
    made = {}

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, groups, adam_w_mode, **settings):
            made.clear()
            made.update(settings, adam_w_mode=adam_w_mode, groups=len(groups))
            super().__init__(groups, **settings)

    apex = types.ModuleType("apex")
    apex.__spec__ = types.SimpleNamespace(name="apex", loader=None)
    other = {"apex": apex, "apex.optimizers": types.ModuleType("apex.optimizers"),
             "apex.normalization": types.ModuleType("apex.normalization")}  # fmt: skip
    for name, stand_in in other.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    wanted = replace(OPTIM, fused="apex")
    groups = module.parameter_groups(_task(), 0.05)
    with pytest.raises(ConfigError, match="apex is not installed"):
        module.make_optimizer(groups, wanted, on_gpu=True)
    other["apex.optimizers"].FusedAdam = FusedAdam
    other["apex.normalization"].FusedLayerNorm = object
    assert isinstance(module.make_optimizer(groups, wanted, on_gpu=True), FusedAdam)
    assert made == {
        "lr": 0.0, "betas": OPTIM.betas, "eps": OPTIM.eps, "adam_w_mode": True, "groups": 2,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [1.0, 1.0001, float("nan")])
def test_a_fused_kernel_is_tried_beside_plain_adamw(wrong, monkeypatch, caplog):
    fused_adam.install(monkeypatch, wrong=wrong)
    groups = module.parameter_groups(_task(), 0.05)
    chosen = module.make_optimizer(groups, OPTIM, on_gpu=True)
    assert isinstance(chosen, FusedAdam if wrong == 1.0 else torch.optim.AdamW)
    assert ("FusedAdam is not used on any rank" in caplog.text) == (wrong != 1.0)
    if wrong != 1.0:
        with pytest.raises(ConfigError, match="plain AdamW"):
            module.make_optimizer(groups, replace(OPTIM, fused="deepspeed"), on_gpu=True)
