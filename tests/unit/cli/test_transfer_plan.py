"""`transfer --plan`: the cost of each training, as `plan` says it, and sums of them."""

from __future__ import annotations

import pytest
from rich.console import Console

from fd_large.cli.plan import plan
from fd_large.cli.transfer_plan import cost_of, report
from fd_large.plan.cluster import Cluster
from fd_large.recipes import registry

ADE20K = registry.get("ade20k_upernet_vit_base")
IMAGES = 20_210


def test_a_cost_is_that_of_the_plan():
    cluster = Cluster(gpus=8, gpus_per_node=8, nic_gigabits=400.0, nics_per_node=8)
    best = plan(ADE20K, cluster)[2][0]
    cost = cost_of(ADE20K, IMAGES, gpus=8, gpu="h100")
    assert (cost.steps, cost.gpus) == (160_000, 8)
    assert cost.hours == pytest.approx(best.seconds.total * 160_000 * 8 / 3600)
    # No more GPUs than divide the 16 images of a step.
    assert cost_of(ADE20K, IMAGES, gpus=64, gpu="h100").gpus == 16
    assert cost_of(ADE20K, IMAGES, gpus=12, gpu="h100").gpus == 4


def test_sums_and_what_cannot_be_planned():
    ade = cost_of(ADE20K, IMAGES, gpus=8, gpu="h100")
    giant = registry.get("ade20k_upernet_swinv2_giant")
    large = cost_of(giant, IMAGES, gpus=1, gpu="a100_40")
    assert (large.hours, large.why) == (None, "no setting fits into memory")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    costs = [("a", "x", ADE20K, ade), ("b", "x", ADE20K, ade), ("a", "y", giant, large)]
    console.print(report(costs, columns=["x", "y"], seeds=3, gpu="h100"))
    text = console.export_text()
    sums = f"{2 * ade.hours:.3g}"
    assert text.count(sums) == 2, "of the column, and of all"
    assert f"3 seeds: {6 * ade.hours:.3g} GPU-hours." in text
    assert "ade20k_upernet_swinv2_giant, a: no setting fits" in text
    assert "160,000" in text
    assert f"{ade.hours / 8:.3g} h " in text, "less than a day, on 8 GPUs"
