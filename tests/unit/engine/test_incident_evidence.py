"""What a skipped step leaves: its images, and the largest magnitude at each layer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from unit.engine.conftest import Brightness, batch_of

from fd_large.engine.forward_backward import prepared
from fd_large.engine.incident_evidence import evidence_of


def outputs(task, batches):
    """Each layer's largest magnitude over the micro batches, by hooks of our own."""
    seen = {}

    def keep(name, output):
        tokens = output[0] if isinstance(output, tuple) else output
        seen.setdefault(name, []).append(tokens.detach().abs().max().item())

    for name, module in task.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
    for batch in batches:
        task(**prepared(task, batch, seed=0))
    return {name: max(values) for name, values in seen.items()}


def test_images_positions_and_maxima_of_all_micro_batches(make_engine):
    engine = make_engine("whole", accumulation=2)
    batches = [batch_of(4), batch_of(5)]
    before = {name: p.clone() for name, p in engine.task.named_parameters()}
    found = evidence_of(engine, batches, [0.5, 0.25], seed=0)
    assert all(map(torch.equal, found.images, [batch.images for batch in batches]))
    assert found.positions.tolist() == found.indices.tolist() == [8, 9, 10, 11]
    assert found.losses == [0.5, 0.25]
    assert all(torch.equal(p, before[name]) for name, p in engine.task.named_parameters())
    assert all(p.grad is None for p in engine.task.parameters())
    task = Brightness()
    task.load_state_dict(engine.task.state_dict())
    expected = outputs(task, batches)
    assert list(found.maxima) == list(expected)
    assert found.maxima == pytest.approx(expected)
    assert not any(module._forward_hooks for module in engine.task.student.modules())


class OfAnySize(Brightness):
    """Takes images of any size, as a detector does."""

    def prepare(self, images, targets, keep):
        return super().prepare(torch.nn.functional.interpolate(images, (8, 8)), targets, keep)


def test_micro_batches_keep_their_sizes(make_engine):
    engine = make_engine("whole", accumulation=2, make_task=OfAnySize)
    batches = [batch_of(4), batch_of(5)]
    batches[1] = replace(batches[1], images=batches[1].images[..., :5, :])
    found = evidence_of(engine, batches, [0.5, 0.25], seed=0)
    assert [tuple(images.shape[-2:]) for images in found.images] == [(8, 8), (5, 8)]
    assert all(map(torch.equal, found.images, [batch.images for batch in batches]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinite_from_its_layer_on(make_engine, value):
    engine = make_engine("whole")
    blocks = engine.task.student.blocks()
    with torch.no_grad():
        blocks[1].mlp.fc2.bias[0] = value
    found = evidence_of(engine, [batch_of(0)], [value], seed=0).maxima
    names = list(found)
    spoilt = next(name for name in names if not math.isfinite(found[name]))
    assert spoilt.endswith("1.mlp.fc2")
    assert found["head"] == math.inf
    assert all(math.isfinite(found[name]) for name in names[: names.index(spoilt)])
