"""State on a disk: the numbers of host memory to the bit, in files that leave nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_disk import mounted
from unit.engine.conftest import batch_of

from fd_large.engine.ema import Ema
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import start, state
from fd_large.engine.zero.disk import Disk
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.errors import ConfigError
from fd_large.runtime import disks

IN_MEMORY = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
WEIGHTS = {"offload_param": {"device": "nvme"}}


def train(engine, accumulation=1):
    """Three steps at a learning rate per layer; returns losses, norms and the whole state."""
    average, rates = Ema(engine, 0.75), by_layer(engine, 0.8)
    rates.at_scale = lambda scale: scale * 1e-2
    found = []
    for number in range(3 * accumulation):
        set_learning_rate(engine.deepspeed.optimizer, 1e-2)
        found.append(forward_backward(engine, batch_of(number), seed=0).item())
        engine.deepspeed.step()
        if (number + 1) % accumulation == 0:
            found.append(float(engine.deepspeed.get_global_grad_norm()))
            average.update()
    return found, {key: values.clone() for key, values in state.shards(engine)}


def mapped(folder: Path) -> int:
    """Number of files of a folder that this process has mapped."""
    return Path("/proc/self/maps").read_text().count(f" {folder}/")


@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["state", "weights too"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_disk_gives_the_numbers_of_host_memory(make_engine, accumulation, weights):
    """With several sub-groups, and clipped."""
    how = {"accumulation": accumulation, "clip_norm": 0.01}
    zero = {"sub_group_size": 100}
    losses, kept = train(make_engine("disk", **how, zero=zero | weights), accumulation)
    expected, others = train(
        make_engine("sharded_bfloat16", **how, zero=zero | IN_MEMORY), accumulation
    )
    assert losses == expected
    assert {key.partition(".")[0] for key in kept} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert kept.keys() == others.keys()
    assert all(torch.equal(values, others[key]) for key, values in kept.items())


def test_a_disk_gives_the_numbers_of_zero3(make_engine):
    """Not clipped: DeepSpeed rounds the norm otherwise under offload."""
    _, kept = train(make_engine("disk", clip_norm=0.0))
    _, others = train(make_engine("sharded_bfloat16", clip_norm=0.0))
    assert all(torch.equal(values, others[key]) for key, values in kept.items())


def test_all_state_is_in_files_without_names(make_engine, tmp_path):
    engine = make_engine("disk", zero=WEIGHTS)
    Ema(engine, 0.5)
    forward_backward(engine, batch_of(0), seed=0)
    engine.deepspeed.step()
    assert not list(tmp_path.iterdir())
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if f" {tmp_path}/" in line
    ]
    optimizer = engine.deepspeed.optimizer
    for owner in optimizer.fp32_partitioned_groups_flat:
        moments = [v for v in optimizer.optimizer.state[owner].values() if v.numel() > 1]
        assert len(moments) == 3
        for tensor in (owner, owner.grad, *moments):
            assert any(low <= tensor.data_ptr() < high for low, high in spans)
    for parameter in engine.task.parameters():
        assert any(low <= parameter.ds_tensor.data_ptr() < high for low, high in spans)


def test_a_tensor_that_is_let_go_of_gives_its_space_back(tmp_path):
    tensor = Disk(str(tmp_path)).zeros(5000)
    assert tensor.eq(0).all()
    part = tensor[10:20].fill_(1)
    del tensor
    gc.collect()
    assert mapped(tmp_path) == 1
    assert part.sum() == 10
    del part
    assert mapped(tmp_path) == 0


def test_an_engine_that_is_let_go_of_gives_its_space_back(one_rank, make_engine, tmp_path):
    engine = make_engine("disk")
    assert mapped(tmp_path)
    engine.deepspeed.destroy()
    make_engine.engines.clear()
    del engine
    start.forget_engines()
    gc.collect()
    assert mapped(tmp_path) == 0


@pytest.mark.parametrize(
    ("kind", "got"),
    [("nfs4", "over a network"), ("tmpfs", "in memory"), ("ext4", "GB free"), ("?", "GB free")],
)
def test_a_folder_that_cannot_hold_the_state_is_refused(tmp_path, monkeypatch, kind, got):
    monkeypatch.setattr(disks, "file_system", lambda path: kind)
    with pytest.raises(ConfigError, match=rf"engine\.nvme_path.*{got}"):
        disks.check_state_folder(str(tmp_path), 10**18)
    with pytest.raises(ConfigError, match=r"^engine\.nvme_path: .*none"):
        disks.check_state_folder(str(tmp_path / "none"), 1)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "1m")


def test_a_disk_that_fills_up_is_said_and_not_met_by_a_signal(tiny_disk, monkeypatch):
    with pytest.raises(ConfigError, match=r"\(tmpfs\)"):
        disks.check_state_folder(str(tiny_disk), 1)
    held = Disk(str(tiny_disk)).zeros(200_000)
    with pytest.raises(ConfigError, match=r"^engine\.nvme_path: .*No space"):
        Disk(str(tiny_disk)).zeros(200_000)
    assert held.fill_(1).sum() == 200_000
