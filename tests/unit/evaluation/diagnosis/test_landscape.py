"""At zero the loss is the net's own, to the bit; directions are as long as the weights."""

from __future__ import annotations

import torch
from torch import nn

from fd_large.evaluation.diagnosis.examine import Extent
from fd_large.evaluation.diagnosis.landscape import curve, random_direction, surface


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5))


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_filters_of_a_direction_are_as_long_as_the_weights() -> None:
    module = net()
    direction = random_direction(module, 0)
    assert list(direction) == ["0.weight", "3.weight"]
    for name, step in direction.items():
        weight = module.get_parameter(name)
        lengths = [t.flatten(1).norm(dim=1) for t in (step, weight)]
        torch.testing.assert_close(*lengths)
    again, other = random_direction(module, 0), random_direction(module, 1)
    assert torch.equal(again["3.weight"], direction["3.weight"])
    assert not torch.equal(other["3.weight"], direction["3.weight"])


def test_a_filter_of_zeros_stays() -> None:
    module = net()
    with torch.no_grad():
        module[3].weight[2] = 0
    assert random_direction(module, 0)["3.weight"][2].tolist() == [0] * 16


def test_zero_is_the_net_itself_to_the_bit_and_the_weights_come_back() -> None:
    module, extent = net(), Extent(reach=1.0, points=5, side=3)
    before = {name: p.clone() for name, p in module.named_parameters()}

    def loss() -> float:
        return module(IMAGES).square().mean().item()

    own = loss()
    line = extent.line(extent.points)
    assert line == [-1, -0.5, 0, 0.5, 1]
    told: list[None] = []
    a, b = random_direction(module, 0), random_direction(module, 1)
    values = curve(module, loss, a, line, lambda: told.append(None))
    rows = surface(module, loss, (a, b), extent.line(3), lambda: told.append(None))
    assert len(told) == 5 + 9
    assert values[2] == own
    assert rows[1][1] == own
    # The middle row of the map is the curve along the first direction.
    assert rows[1] == [values[0], values[2], values[4]]
    assert len(set(values)) == 5
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_step_is_the_direction_times_its_length() -> None:
    module = net()
    direction = random_direction(module, 0)
    expected = module[3].weight + 0.5 * direction["3.weight"]
    seen = []

    def loss() -> torch.Tensor:
        seen.append(module[3].weight.clone())
        return torch.zeros(())

    curve(module, loss, direction, [0.5], lambda: None)
    torch.testing.assert_close(seen[0], expected)


def test_weights_come_back_after_an_error() -> None:
    module = net()
    before = module[3].weight.clone()

    def loss() -> torch.Tensor:
        raise KeyboardInterrupt

    try:
        curve(module, loss, random_direction(module, 0), [1.0], lambda: None)
    except KeyboardInterrupt:
        assert torch.equal(module[3].weight, before)
    else:
        raise AssertionError("the interruption was lost")
