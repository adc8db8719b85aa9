"""What the canary asks of a teacher: a hash of what this rank holds, the map of fixed images."""

import pytest
import torch
from torch import nn

from fd_large.tasks.distillation.teacher import PlacedTeacher


class Net(nn.Module):
    width = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5)
        self.tokens = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False]))


class Mapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.width = Net(), Net.width
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return type("Map", (), {"tokens": images.float().mean((2, 3))[:, None]})


@pytest.fixture
def teacher():
    return PlacedTeacher(Mapping(), None, None)


def test_the_hash_is_that_of_the_bits_held_here(teacher) -> None:
    first = teacher.shard_hash()
    assert first.startswith("1/1 ")
    assert teacher.shard_hash() == first == PlacedTeacher(Mapping(), None, None).shard_hash()
    for tensor, other in [
        (teacher.module.net.linear.weight.data[1, 2:], 0.125),
        (teacher.module.net.tokens.data[-1:], 0.125),
        (teacher.module.net.scale.view(1), 0.0),
        (teacher.module.net.index[3:], 0),
        (teacher.module.net.mask[:1], False),
    ]:
        before = tensor.clone()
        tensor.fill_(other)
        assert teacher.shard_hash() != first
        tensor.copy_(before)
        assert teacher.shard_hash() == first


def test_the_fixed_images_are_noise_and_always_the_same(teacher) -> None:
    state = torch.random.get_rng_state()
    maps = [teacher.map_of_fixed_images(size) for size in (30, 30)]
    first, second = teacher.module.seen
    assert first.shape == (2, 3, 30, 30)
    assert first.dtype == torch.uint8
    assert (first == second).all()
    assert (first[0] != first[1]).any()
    assert len(first.unique()) == 256
    assert torch.equal(*maps)
    assert not maps[0].requires_grad
    assert torch.equal(state, torch.random.get_rng_state())
