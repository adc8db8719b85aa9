"""DeepSpeed's ways with gradients and ours: the same sums, norms and steps, bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from fd_large import distributed
from fd_large.engine.zero import gradient_buckets
from fd_large.engine.zero.float32_sums import Float32Sums
from fd_large.engine.zero.gradient_shards import OwnedShards, norm_of_shards
from fd_large.engine.zero.start import deepspeed
from fd_large.engine.zero.whole_gradients import WholeGradients


@pytest.fixture
def twin_rank(monkeypatch):
    """A second rank with the same gradients; gives the sizes that were reduced, in order."""
    sizes = []

    def all_reduce(tensor, group=None, async_op=False):
        sizes.append(tensor.numel())
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    def reduce(tensor, dst, async_op):
        sizes.append((dst, tensor.numel()))
        # Whoever does not own a sum is left with numbers that mean nothing.
        tensor.mul_(2 if dst == distributed.rank() else float("nan"))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", all_reduce)
    monkeypatch.setattr(deepspeed.comm, "reduce", reduce)
    return sizes


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


class ZeroOptimizer:
    """What DeepSpeedZeroOptimizer knows of its parameters: two groups, each flat and padded."""

    def __init__(self):
        self.bit16_groups, self.bit16_groups_flat, self.partition_size = [], [], []
        for shapes in (((3, 2), (5,), (2, 2)), ((3,),)):
            sizes = [torch.Size(shape).numel() for shape in shapes]
            flat = torch.zeros(-(-sum(sizes) // 4) * 4)
            views = flat[: sum(sizes)].split(sizes)
            self.bit16_groups.append(
                [torch.nn.Parameter(v.view(s)) for v, s in zip(views, shapes, strict=True)]
            )
            self.bit16_groups_flat.append(flat)
            self.partition_size.append(len(flat) // 2)
        self.averaged_gradients = {}

    def process_gradients(self, parameter, group):
        raise NotImplementedError

    reduce_gradients = overlapping_partition_gradients_reduce_epilogue = process_gradients
    scaled_global_norm = process_gradients


@pytest.mark.parametrize("sent", [torch.float32, torch.float64])
@pytest.mark.parametrize("most_owners", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_the_means_of_what_it_steps(
    twin_rank, monkeypatch, stage, rank, most_owners, sent
):
    """Two steps of two micro batches; a parameter takes no part in the second."""
    monkeypatch.setattr(gradient_buckets, "MOST_OWNERS", most_owners)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    optimizer, boundary = ZeroOptimizer(), False
    engine = SimpleNamespace(
        optimizer=optimizer,
        zero_optimization_stage=lambda: stage,
        communication_data_type=sent,
        is_gradient_accumulation_boundary=lambda: boundary,
    )
    monkeypatch.setattr(distributed, "sum_tensor", lambda square: 2 * square)
    OwnedShards(engine, bucket=5)
    # The groups have partitions of 8 and 2 elements, cut at 5; the last ones come first.
    order = [(1, 2), (1, 5), (1, 1), (0, 3), (0, 5), (0, 2)]
    if most_owners == 1:
        # All ranks get 15 elements of the first group, cut at 5 and 10, and 3 of the second.
        order = [5, 5, 5, 3]
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        expected = [torch.zeros(16), torch.zeros(4)]
        for micro in range(2):
            boundary = micro == 1
            for group, parameters in reversed([*enumerate(optimizer.bit16_groups)]):
                for number, parameter in reversed([*enumerate(parameters)]):
                    if step == 1 and number == 1:
                        continue
                    values = torch.randn(parameter.shape, generator=generator)
                    place = parameter.data.storage_offset()
                    expected[group][place : place + parameter.numel()] += values.view(-1)
                    parameter.grad = values if parameter.grad is None else parameter.grad + values
                    optimizer.process_gradients(parameter, group)
            if step == 0 and (boundary or stage == 2):
                assert twin_rank == order, "beside backward"
            if boundary or stage == 2:
                optimizer.overlapping_partition_gradients_reduce_epilogue()
                assert all(p.grad is None for group in optimizer.bit16_groups for p in group)
                twin_rank.clear()
            assert not twin_rank
        for group, whole in enumerate(expected):
            size = optimizer.partition_size[group]
            found = optimizer.averaged_gradients[group]
            assert torch.equal(found.flat_partition, whole[rank * size : (rank + 1) * size])
        exact = norm_of(optimizer.averaged_gradients)
        assert optimizer.scaled_global_norm() == pytest.approx(exact.item(), rel=1e-6)


def norm_of(gradients) -> torch.Tensor:
    """The norm of this rank's shards and of a twin's, in float64."""
    flat = torch.cat([found.flat_partition for found in gradients.values()])
    return flat.double().square().sum().mul(2).sqrt().float()


def test_a_norm_is_exact_over_many_elements(monkeypatch):
    monkeypatch.setattr(distributed, "sum_tensor", lambda square: square)
    shards = [torch.rand(size, generator=torch.Generator().manual_seed(0)) for size in (900_001, 7)]
    exact = torch.cat(shards).double().norm()
    assert abs(norm_of_shards(shards) / exact - 1) < 3e-7
