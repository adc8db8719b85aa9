"""Counts of a step: kept or made anew, and what decides them."""

from dataclasses import replace

import pytest

from fd_large import doors
from fd_large.cli.plan import plan
from fd_large.cli.plan_workload import count_anew, shape_fields
from fd_large.plan import kept_counts
from fd_large.plan.cluster import Cluster
from fd_large.plan.rates import CARDS
from fd_large.plan.search import checkpoint_bytes
from fd_large.recipes import registry

# With fused kernels and without; others are counted in the sweep.
QUICK = {("quickstart", "h100"), ("quickstart", "l40s"), ("fd_clip_vit_base", "h100")}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        pytest.param(name, gpu, marks=() if (name, gpu) in QUICK else pytest.mark.sweep)
        for name in registry.RECIPES
        for gpu in ("h100", "l40s")
    ],
)
def test_kept_counts_are_those_of_the_recipe(name, gpu):
    """If this fails: python benchmarks/keep_counts.py."""
    run, rates = registry.get(name), CARDS[gpu]
    kept = kept_counts.read(kept_counts.key(shape_fields(run), rates.capability, "fused"))
    assert kept == count_anew(run, rates, "fused")


@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_s_counts_are_kept(name):
    """If this fails: python benchmarks/keep_counts.py."""
    fields = shape_fields(registry.get(name))
    for capability in {rates.capability for rates in CARDS.values()}:
        assert kept_counts.read(kept_counts.key(fields, capability, "fused"))


def test_what_changes_a_step_is_counted_anew():
    run = registry.get("fd_clip_vit_base")
    fields = shape_fields(run)
    for change in (
        {"batch": {"global_batch_size": 8192}},
        {"student": {"activation_checkpointing": "every", "init": "hf:some/where"}},
        {"teacher": {"placement": "sharded", "source": "random"}},
    ):
        assert shape_fields(changed(run, change)) == fields
    for change in (
        {"data": {"image_size": 192}},
        {"student": {"checkpoint_every": 2}},
        {"teacher": {"dtype": "float32"}},
        {"objective": {"teacher_image_size": 256}},
    ):
        assert shape_fields(changed(run, change)) != fields


def changed(run, change):
    sections = {name: replace(getattr(run, name), **values) for name, values in change.items()}
    return replace(run, **sections)


def test_an_optimiser_of_the_users_own_is_counted_by_what_it_keeps(tmp_path):
    path = tmp_path / "sgd.py"
    path.write_text(
        "import torch\n"
        "def momentum(groups, lr):\n    return torch.optim.SGD(groups, lr=lr, momentum=0.9)\n"
        "def plain(groups, lr):\n    return torch.optim.SGD(groups, lr=lr)\n"
    )
    doors.allow(path)
    run = registry.get("fd_swinv2_base")
    cluster = Cluster(gpus=8, gpus_per_node=8, nic_gigabits=400, nics_per_node=8)
    stored, states = [], []
    for name in ("adamw", f"module:{path}:momentum", f"module:{path}:plain"):
        load, _, good, _ = plan(replace(run, optim=replace(run.optim, name=name)), cluster)
        stored.append(checkpoint_bytes(load) / load.parameters)
        states.append(min(one.memory.states for one in good))
    assert stored == [12, 8, 4]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 3
