"""The sums that each rank keeps of what it steps, and their norm."""

from types import SimpleNamespace

import pytest
import torch

from fd_large.engine.zero import gradient_buckets
from fd_large.engine.zero.gradient_shards import OwnedShards, norm_of_shards
from fd_large.ranks import distributed


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
        self.parallel_partitioned_bit16_groups = [flat.chunk(2) for flat in self.bit16_groups_flat]
        self.single_partition_of_fp32_groups = [
            shards[distributed.rank()].clone() for shards in self.parallel_partitioned_bit16_groups
        ]
        self.averaged_gradients, self.linked = {}, []

    def process_gradients(self, parameter, group):
        raise NotImplementedError

    def _link_all_hp_params(self):
        self.linked = [master.data_ptr() for master in self.single_partition_of_fp32_groups]

    _update_model_bit16_weights = process_gradients
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
    OwnedShards(engine, bucket_size=5)
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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_masters_are_the_parameters_themselves(twin_rank, monkeypatch, rank, dtype):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    optimizer = ZeroOptimizer()
    shards = [group[rank] for group in optimizer.parallel_partitioned_bit16_groups]
    masters = [torch.nn.Parameter(shard.to(dtype, copy=True)) for shard in shards]
    optimizer.single_partition_of_fp32_groups = masters
    engine = SimpleNamespace(
        optimizer=optimizer, zero_optimization_stage=lambda: 1, communication_data_type=dtype
    )
    OwnedShards(engine, 5)
    in_place = dtype == torch.float32
    for master, shard in zip(masters, shards, strict=True):
        assert (master.data_ptr() == shard.data_ptr()) == in_place
    assert optimizer.linked == [master.data_ptr() for master in masters]
    with torch.no_grad():
        masters[0].fill_(3)
    optimizer._update_model_bit16_weights(0)
    found = torch.cat([p.detach().view(-1) for p in optimizer.bit16_groups[0]])
    begin = rank * optimizer.partition_size[0]
    stepped = torch.zeros(len(found), dtype=torch.bool)
    stepped[begin : begin + optimizer.partition_size[0]] = in_place
    assert torch.equal(found == 3, stepped)


def norm_of(gradients) -> torch.Tensor:
    """The norm of this rank's shards and of a twin's, in float64."""
    flat = torch.cat([found.flat_partition for found in gradients.values()])
    return flat.double().square().sum().mul(2).sqrt().float()


def test_a_norm_is_exact_over_many_elements(monkeypatch):
    monkeypatch.setattr(distributed, "sum_tensor", lambda square: square)
    shards = [torch.rand(size, generator=torch.Generator().manual_seed(0)) for size in (900_001, 7)]
    exact = torch.cat(shards).double().norm()
    assert abs(norm_of_shards(shards) / exact - 1) < 3e-7
