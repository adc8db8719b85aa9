"""Slices of flat groups learn as groups of their own do."""

from __future__ import annotations

import fused_adam
import pytest
import torch
from torch import nn
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.engine.forward_backward import forward_backward, prepared
from fd_large.engine.zero import partition, state
from fd_large.engine.zero.layer_decay import LayerLearningRates, LayerSlice, _joined, by_layer
from fd_large.engine.zero.optimizer import make_optimizer, parameter_groups
from fd_large.recipes.sections import Optim

DECAY, PEAK = 0.5, 1e-2


@pytest.mark.parametrize("config", [name for name, (_, bf16) in CONFIGS.items() if not bf16])
def test_each_layer_learns_as_in_a_group_of_its_own(make_engine, config):
    engine = make_engine(config)
    rates = by_layer(engine, DECAY)
    plain = partition.build(Brightness, {}, partitioned=False, seed=0)
    optim = Optim()
    decayed = {id(p) for p in parameter_groups(plain, 1.0)[0]["params"]}
    groups = [
        {
            "params": [parameter],
            "lr": PEAK * plain.layer_scale(name, DECAY),
            "weight_decay": optim.weight_decay * (id(parameter) in decayed),
        }
        for name, parameter in plain.named_parameters()
    ]
    assert len({group["lr"] for group in groups}) == 4, "stem, two blocks, head"
    reference = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    rates.at_scale = lambda scale: PEAK * scale
    for number in range(3):
        forward_backward(engine, batch_of(number), seed=0)
        engine.deepspeed.step()
        reference.zero_grad()
        loss, _ = plain(**prepared(plain, batch_of(number), 0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        reference.step()
    for key, values in state.shards(engine):
        if key.startswith("master."):
            expected = plain.get_parameter(key.removeprefix("master.")).detach()
            torch.testing.assert_close(values.view(-1), expected.view(-1), rtol=1e-5, atol=1e-6)


def test_a_flat_factor_is_that_of_the_backbone_alone(make_engine):
    engine = make_engine()
    for decay in (1.0, DECAY):
        rates = by_layer(engine, decay, 0.1)
        found = {cut.scale for cuts in rates._slices.values() for cut in cuts}
        names = [name for name, _ in engine.task.named_parameters()]
        inside = {name for name in names if name.startswith("student.")}
        assert 0 < len(inside) < len(names)
        assert found == {
            engine.task.layer_scale(name, decay) * (0.1 if name in inside else 1.0)
            for name in names
        }


def test_without_decay_the_optimiser_steps_as_it_is(make_engine):
    engine = make_engine()
    assert by_layer(engine, 1.0) is None


def test_neighbours_of_one_scale_are_one_slice_with_the_padding_between_them():
    cuts = [
        LayerSlice(8, 9, 0.5),
        LayerSlice(0, 3, 1.0),
        LayerSlice(4, 8, 1.0),
        LayerSlice(9, 9, 2.0),
    ]
    assert _joined(cuts) == [LayerSlice(0, 8, 1.0), LayerSlice(8, 9, 0.5)]


def test_steps_are_read_where_apex_counts_them():
    """In the group, of which each scale has a copy."""

    flat = nn.Parameter(torch.ones(8))
    inner = make_optimizer([{"params": [flat], "weight_decay": 0.1}], Optim(), on_gpu=False)

    def count() -> None:
        for group in inner.param_groups:
            group["step"] = group.get("step", 0) + 1

    slices = [LayerSlice(0, 4, 0.5), LayerSlice(4, 8, 1.0)]
    rates = LayerLearningRates(inner, count, {id(flat): slices})
    rates.at_scale = lambda scale: PEAK * scale
    for step in (1, 2, 3):
        flat.grad = torch.ones(8)
        rates.step()
        assert inner.param_groups[0]["step"] == step


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 4, 0.5), (4, 8, 1.0)],
        [(0, 2, 1.0), (2, 6, 0.5), (6, 8, 1.0)],
        # The scale that is met last has two slices, of which DeepSpeed counts on the last.
        [(0, 2, 0.5), (2, 4, 1.0), (4, 6, 0.5), (6, 8, 1.0)],
    ],
)
def test_steps_are_read_where_deepspeeds_fused_kernel_counts_them(cuts, monkeypatch):
    launched = fused_adam.install(monkeypatch)
    optim = Optim(fused="deepspeed")
    flat = nn.Parameter(torch.linspace(-1, 1, 8))
    plain = [nn.Parameter(flat.detach()[start:stop].clone()) for start, stop, _ in cuts]
    inner = make_optimizer([{"params": [flat], "weight_decay": 0.1}], optim, on_gpu=True)
    rates = LayerLearningRates(inner, inner.step, {id(flat): [LayerSlice(*cut) for cut in cuts]})
    rates.at_scale = lambda scale: PEAK * scale
    reference = torch.optim.AdamW(
        [{"params": [p], "lr": PEAK * cut[2]} for p, cut in zip(plain, cuts, strict=True)],
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=0.1,
    )
    for step in range(1, 6):
        flat.grad = torch.linspace(1, 2, 8) / step
        for p, (start, stop, _) in zip(plain, cuts, strict=True):
            p.grad = flat.grad[start:stop].clone()
        rates.step()
        reference.step()
        assert set(launched[-2:]) == {step}
        assert inner.state[flat]["step"] == step
    torch.testing.assert_close(flat.detach(), torch.cat([p.detach() for p in plain]))
