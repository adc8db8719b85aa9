"""What a run stores of its teachers' maps while it learns from them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import tiny_runs
import torch
from cached_runs import IMAGES, VIEWS, built, cached, prepared, run_of, write_images
from loading import settled

from fd_large.cli.cache_costs import costs_of
from fd_large.cli.plan_workload import workload
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.rates import CARDS
from fd_large.plan.search import search
from fd_large.recipes.fields import override
from fd_large.recipes.run import ONLY
from fd_large.tasks.distillation.job import DistillationJob


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def test_the_first_epochs_write_what_later_ones_read(root, tmp_path, monkeypatch):
    fields = {"batch.global_batch_size": 8, "task.distillation.precision": "fp32"}
    job = built(run_of(root, **fields, **{"task.distillation.cache": str(tmp_path / "cache")}))
    usual = built(run_of(root, **fields))
    calls = []
    teacher = job.teachers[ONLY]
    monkeypatch.setattr(
        type(teacher), "__call__", lambda self, images: calls.append(self) or self.module(images)
    )
    for epoch in range(2 * VIEWS):
        del calls[:]
        pairs = zip(prepared(job, epoch), prepared(usual, epoch), strict=True)
        for (own, stored), (theirs, given) in pairs:
            assert torch.equal(own.images, theirs.images)
            assert torch.equal(stored["maps"][ONLY].tokens, given["maps"][ONLY].tokens)
        # An epoch takes 8 of 12 images; the other 4 are stored before their view comes again.
        assert sum(one is teacher for one in calls) == (5 if epoch == 0 else 4 if epoch == 1 else 2)
    again = cached(root, tmp_path / "cache", **fields, **{"task.distillation.cache": ""})
    for (_, stored), (_, given) in zip(prepared(again, 1), prepared(usual, 1), strict=True):
        assert torch.equal(stored["maps"][ONLY].tokens, given["maps"][ONLY].tokens)


def test_of_several_teachers_each_is_recorded_and_reckoned_for_itself(root, tmp_path):
    several = settled(tiny_runs.with_teachers(run_of(root), "first", "second"))
    job = built(override(several, {"task.distillation.cache": str(tmp_path)}))
    assert job.view_batches(job.samples, 0).beside.blank().keys() == {"first", "second"}
    views = replace(job.caches.views_to_store(job.samples), batch_size=4)
    job.caches.recorders["first"].complete(0, views, workers=0, max_bad_fraction=0.5)
    assert job.view_batches(job.samples, 0).beside.blank().keys() == {"second"}
    # What is left of a step without the one has the other.
    run = override(several, {"optim.max_steps": 2 * IMAGES, "batch.micro_batch_size": "auto"})
    load, card = workload(run), CARDS["h100"]
    costs = costs_of(
        DistillationJob(run),
        load=load,
        rates=card,
        images=IMAGES,
        precision="fp16",
        runs=1,
        read_bytes_per_second=1e9,
    )
    assert costs["first"].student_seconds > costs["second"].teacher_seconds > 0
    # The whole is the time that plan has for one rank, which is spent on starting operations.
    batch = run.batch.global_batch_size
    alone = Cluster(gpus=1, gpus_per_node=8, nic_gigabits=400, nics_per_node=8)
    planned, _ = search(load, Machine(cluster=alone, rates=card))
    for cost in costs.values():
        taken = cost.student_seconds + cost.teacher_seconds
        assert taken == pytest.approx(planned[0].seconds.total / batch, rel=0.01)
    calls = load.counts[False].calls["inference"]
    both = sum(cost.teacher_seconds for cost in costs.values())
    assert both == pytest.approx(calls * card.launch_seconds / batch, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_run_beside_a_cache_that_is_full_says_so(precision, root, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fields = {
        "batch.global_batch_size": 8,
        "task.distillation.precision": precision,
        "task.distillation.cache": str(tmp_path / "cache"),
    }

    def learn(job):
        """All maps of the epochs in which the cache is filled, and what is told of each."""
        caplog.clear()
        maps = []
        for epoch in range(VIEWS + 1):
            maps += [given["maps"][ONLY].tokens.clone() for _, given in prepared(job, epoch)]
        told = [r.levelname for r in caplog.records if "task.distillation.cache" in r.getMessage()]
        return maps, told

    first = built(run_of(root, **fields))
    live, told = learn(first)
    assert told == []
    assert first.facts()["epochs_from_stored_maps"] == []
    # The second view's last images are stored when it comes again.
    for _ in prepared(first, VIEWS + 1):
        pass
    second = built(run_of(root, **fields))
    facts, summary = second.facts(), second.summary()
    stored, told = learn(second)
    assert told == [{"fp32": "INFO", "fp8": "WARNING"}[precision]] * VIEWS
    # The manifests' facts are made before the first epoch.
    assert facts["epochs_from_stored_maps"] == summary["epochs_from_stored_maps"] == [1, 2]
    same = [torch.equal(mine, theirs) for mine, theirs in zip(stored, live, strict=True)]
    assert all(same) == (precision == "fp32")
    # One that falls back to a checkpoint of the first run's, from before the cache was full.
    third = built(run_of(root, **fields))
    third.check_stored({**first.facts(), "epochs_from_stored_maps": [1]})
    caplog.clear()
    for _ in prepared(third, 1):
        pass
    assert "epoch 2 learns from the maps" in caplog.text
    assert third.facts()["epochs_from_stored_maps"] == [1, 2]
