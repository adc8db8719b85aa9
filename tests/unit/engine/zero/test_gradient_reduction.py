"""DeepSpeed's ways with gradients and ours: the same sums, norms and steps, bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from fd_large import distributed
from fd_large.engine.zero.gradient_reduction import _Float32Sums, _WholeGradients
from fd_large.engine.zero.start import deepspeed


@pytest.fixture
def twin_rank(monkeypatch):
    """A second rank with the same gradients; gives the sizes that were reduced, in order."""
    sizes = []

    def all_reduce(tensor, group=None, async_op=False):
        sizes.append(tensor.numel())
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", all_reduce)
    return sizes


class Bf16Optimizer:
    """What BF16_Optimizer keeps of its gradients: one group of two parameters and padding."""

    def __init__(self):
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,))]
        flat = torch.zeros(12)
        self.fp32_groups_gradients_flat = [flat]
        self.fp32_groups_gradients = [[flat[:6], flat[6:10]]]
        self.fp32_groups_has_gradients = [[False, False]]
        self.fp32_groups_gradient_flat_partition = [flat]
        self.dp_process_group = None

    def _update_hp_grad(self):
        raise NotImplementedError

    clear_hp_grads = _update_hp_grad

    def get_grads_for_norm(self):
        return self.fp32_groups_gradients[0]


def test_float32_sums_are_those_of_plain_addition(twin_rank):
    optimizer = Bf16Optimizer()
    boundary = False
    engine = SimpleNamespace(
        optimizer=optimizer,
        # What is sent in another type comes back rounded, which is not the question here.
        communication_data_type=torch.float64,
        buffered_allreduce_fallback=None,
        is_gradient_accumulation_boundary=lambda: boundary,
    )
    _Float32Sums(engine, bucket=5)
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
        # Of the buckets at 10 (padding), 5 and 0 none waits for the end, if each gradient came.
        assert twin_rank == ([2] if update == 1 else [2, 5, 5])
        engine.buffered_allreduce_fallback(grads=None, elements_per_buffer=10)
        assert twin_rank == [2, 5, 5]
        twin_rank.clear()
        assert torch.equal(optimizer.fp32_groups_gradients_flat[0], expected), update
        assert optimizer.fp32_groups_has_gradients == [[True, update != 1]]
        assert (
            optimizer.get_grads_for_norm(for_clipping=True)[0]
            is (optimizer.fp32_groups_gradient_flat_partition[0])
        )
        assert len(optimizer.get_grads_for_norm()) == 2
        optimizer.clear_hp_grads()
        assert optimizer.fp32_groups_has_gradients == [[False, False]]


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_stage_0_clips_by_the_norm_that_it_tells(clip):
    layer = torch.nn.Linear(5, 3)
    twin = torch.nn.Linear(5, 3)
    twin.load_state_dict(layer.state_dict())
    stepped = []

    def take_step(lr_kwargs):
        engine.clip_fp32_gradients()
        stepped.append([p.grad.clone() for p in layer.parameters()])

    engine = SimpleNamespace(
        module=layer,
        optimizer=SimpleNamespace(),
        gradient_clipping=lambda: clip,
        _take_model_step=take_step,
        buffered_allreduce_fallback=None,
        clip_fp32_gradients=None,
    )
    _WholeGradients(engine, bucket=10)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for net in (layer, twin):
        net(x).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip or torch.inf)
    engine._take_model_step(None)
    assert engine.optimizer._global_grad_norm == expected
    for got, wanted in zip(stepped[0], twin.parameters(), strict=True):
        assert torch.equal(got, wanted.grad)
    # One rank: nothing is reduced.
    assert engine.buffered_allreduce_fallback([1]) is None


def test_stage_0_averages_beside_backward(twin_rank):
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    spare = torch.nn.Parameter(torch.ones(3))
    net.register_parameter("spare", spare)
    twin = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if k != "spare"})
    boundary = False
    engine = SimpleNamespace(
        module=net,
        communication_data_type=torch.float32,
        buffered_allreduce_fallback=None,
        clip_fp32_gradients=None,
        _take_model_step=None,
        is_gradient_accumulation_boundary=lambda: boundary,
    )
    _WholeGradients(engine, bucket=7)
    for uses_all in (True, False):
        for micro in range(2):
            boundary = micro == 1
            x = torch.full((1, 2), 1.0 + micro)
            (net(x).sum() + (spare.sum() if uses_all else 0)).backward()
            twin(x).sum().backward()
            if not boundary:
                assert not twin_rank
        # Last layers first; what took no part comes when backward is over.
        assert twin_rank == ([6, 6, 6, 3] if uses_all else [6, 6, 6])
        engine.buffered_allreduce_fallback([])
        assert twin_rank == [6, 6, 6, 3]
        twin_rank.clear()
        for name, parameter in twin.named_parameters():
            assert torch.equal(net.get_parameter(name).grad, parameter.grad)
            parameter.grad = None
        assert torch.equal(spare.grad, torch.full((3,), 2.0 if uses_all else 0.0))
        for parameter in net.parameters():
            parameter.grad = None
