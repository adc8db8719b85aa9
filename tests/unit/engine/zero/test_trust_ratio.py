"""LARS in the engine against its formula on whole tensors, at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from unit.engine.conftest import Brightness, batch_of
from unit.engine.zero.test_state import step, stored

from fd_large.engine.forward_backward import prepared
from fd_large.engine.zero import partition
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import parameter_groups
from fd_large.engine.zero.trust_ratio import scale_by_norms
from fd_large.recipes.sections import Optim

DECAY = 0.05


@pytest.mark.parametrize(
    "config", [(0, False), (1, False), (2, False), (3, False), (1, True), (3, True)]
)
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_it_steps_as_on_whole_tensors(make_engine, config, layer_decay):
    """You et al., arXiv 1708.03888: w -= lr * m, m = .9 m + .001 |w| / |g + d w| (g + d w)."""
    engine = make_engine(config, optim=Optim(name="lars", weight_decay=DECAY), clip_norm=0.0)
    if rates := by_layer(engine, layer_decay):
        rates.at_scale = lambda scale: 1e-2 * scale
    scale_by_norms(engine)
    plain = partition.build(Brightness, {}, partitioned=False, seed=0)
    decayed = {id(p) for p in parameter_groups(plain, DECAY)[0]["params"]}
    momentum = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for number in range(3):
        step(engine, number)
        plain.zero_grad()
        plain(**prepared(plain, batch_of(number), 0))[0].backward()
        for name, parameter in plain.named_parameters():
            with torch.no_grad():
                change = parameter.grad.clone()
                if parameter.ndim > 1:
                    change += DECAY * (id(parameter) in decayed) * parameter
                    norms = parameter.norm(), change.norm()
                    change *= 0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0
                momentum[name].mul_(0.9).add_(change)
                scale = plain.layer_scale(name, layer_decay)
                parameter.sub_(momentum[name], alpha=1e-2 * scale)
    for key, values in stored(engine).items():
        kind, _, name = key.partition(".")
        if kind == "master":
            moved = plain.get_parameter(name).detach() - before[name]
            found = values.view(-1) - before[name].view(-1)
            if config[1]:  # The gradients are those of a bfloat16 model.
                assert (found - moved.view(-1)).norm() < 0.1 * moved.norm()
            else:
                torch.testing.assert_close(found, moved.view(-1), rtol=1e-3, atol=1e-8)
