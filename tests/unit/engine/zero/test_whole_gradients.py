"""Stage 0: averages beside backward, and one norm for clipping and the log."""

from types import SimpleNamespace

import pytest
import torch

from fd_large.engine.zero.whole_gradients import WholeGradients


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
    WholeGradients(engine, bucket=10)
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
    WholeGradients(engine, bucket=7)
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
