"""Sums in float32 at stage 1 in bfloat16: those of plain addition, bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from fd_large.engine.zero.float32_sums import Float32Sums
from fd_large.ranks import distributed


class Bf16Optimizer:
    """What BF16_Optimizer keeps of its gradients: one group of two parameters and padding."""

    def __init__(self, rank):
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,))]
        flat = torch.zeros(12)
        self.fp32_groups_gradients_flat = [flat]
        self.fp32_groups_gradients = [[flat[:6], flat[6:10]]]
        self.fp32_groups_has_gradients = [[False, False]]
        self.fp32_groups_gradient_flat_partition = [flat[6 * rank : 6 * rank + 6]]

    def _update_hp_grad(self):
        raise NotImplementedError

    clear_hp_grads = get_grads_for_norm = _update_hp_grad


@pytest.mark.parametrize("rank", [0, 1])
def test_float32_sums_are_those_of_plain_addition(twin_rank, monkeypatch, rank):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "sum_tensor", lambda square: 2 * square)
    optimizer = Bf16Optimizer(rank)
    boundary = False
    engine = SimpleNamespace(
        optimizer=optimizer,
        # What is sent in another type comes back rounded, which is not the question here.
        communication_data_type=torch.float64,
        buffered_allreduce_fallback=None,
        is_gradient_accumulation_boundary=lambda: boundary,
    )
    Float32Sums(engine, bucket=5)
    generator = torch.Generator().manual_seed(0)
    for update in range(3):
        expected = torch.zeros(12)
        for micro in range(2):
            boundary = micro == 1
            # Backward comes to the last parameters first.
            for index, parameter in reversed([*enumerate(optimizer.parameters)]):
                # In the second update the second parameter takes no part.
                if index == 1 and update == 1:
                    parameter.grad = None
                else:
                    values = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = values.bfloat16().float()
                    start = 6 * index
                    expected[start : start + parameter.numel()] += parameter.grad.view(-1)
                optimizer._update_hp_grad(parameter, 0, index, clear_lp_grads=micro == 1)
            assert boundary or not twin_rank
        # No bucket (at 11, padding, 6, 5 and 0) waits for the end, if each gradient came.
        sent = [(1, 1), (1, 5), (0, 1), (0, 5)]
        assert twin_rank == (sent[:1] if update == 1 else sent)
        engine.buffered_allreduce_fallback(grads=None, elements_per_buffer=10)
        assert twin_rank == sent
        twin_rank.clear()
        (shard,) = optimizer.fp32_groups_gradient_flat_partition
        assert torch.equal(shard, expected[6 * rank : 6 * rank + 6]), update
        assert optimizer.fp32_groups_has_gradients == [[True, update != 1]]
        assert optimizer.get_grads_for_norm(for_clipping=True)[0] is shard
        ((norm,), experts) = optimizer.get_grads_for_norm()
        assert norm == pytest.approx(shard.double().norm().item() * 2**0.5, rel=1e-6)
        assert experts == {}
        optimizer.clear_hp_grads()
        assert optimizer.fp32_groups_has_gradients == [[False, False]]
