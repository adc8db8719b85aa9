"""`transfer --plan`: the cost of each training, as `plan` says it, and sums of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from fd_large.cli.plan import plan
from fd_large.cli.plan_report import figures
from fd_large.cli.transfer_plan import Cost, cost_of, report
from fd_large.plan.cluster import Cluster
from fd_large.recipes import registry

ADE20K = registry.get("ade20k_upernet_vit_base")
IMAGES = 20_210


def test_a_cost_is_that_of_the_plan():
    cluster = Cluster(gpus=8, gpus_per_node=8, nic_gigabits=400.0, nics_per_node=8)
    best = plan(ADE20K, cluster)[2][0]
    cost = cost_of(ADE20K, IMAGES, gpus=8, gpu="h100")
    assert (cost.steps, cost.gpus) == (160_000, 8)
    assert cost.hours == pytest.approx(best.seconds.between.scaled(160_000 * 8 / 3600))
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
    console.print(report(costs, seeds=3, gpu="h100"))
    text = console.export_text()
    sums = figures(ade.hours.scaled(2))
    assert text.count(sums) == 2, "of the column, and of all"
    assert f"3 seeds: {figures(ade.hours.scaled(6))} GPU-hours." in text
    (total,) = (line.split() for line in text.splitlines() if line.strip().startswith("all"))
    assert total == ["all", sums, "-", sums], "a column of which nothing is known has no sum"
    assert "Not planned: y for a (no setting fits into memory)." in text
    assert "160,000" in text
    assert f"{figures(ade.hours.scaled(1 / 8))} h " in text, "less than a day, on 8 GPUs"


def test_a_reason_is_told_once_and_names_are_whole_at_80_columns():
    names = ("coco_mask_rcnn_swinv2_giant", "ade20k_upernet_swinv2_giant")
    why = "student.model: the pyramid stands on 4 stages; got 2, expected 4"
    costs = [
        (row, column, registry.get(name), Cost(160_000, 8, None, why=why))
        for row in ("fd_swinv2_base_mine", "fd_swinv2_base_mine: from scratch")
        for column, name in zip(("coco", "ade20k"), names, strict=True)
    ]
    costs.append(("other", "ade20k", registry.get(names[1]), Cost(1, 8, None, why=why)))
    columns = ["coco", "ade20k", "finetune", "linear", "nyuv2"]
    costs += [
        ("a", name, registry.get(names[1]), Cost(1, 8, None, why="x")) for name in columns[2:]
    ]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(costs, seeds=1, gpu="h100"))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    for name in (*columns, *names):
        assert name in text.split()
    told = " ".join(text.split())
    assert told.count(why) == 2
    assert (
        "Not planned: coco, ade20k for fd_swinv2_base_mine; fd_swinv2_base_mine: from scratch "
        f"({why})." in told
    )
    assert f"Not planned: ade20k for other ({why})." in told


def test_the_remedy_for_who_sets_the_model_is_left_out():
    run = registry.get("ade20k_upernet_swinv2_base")
    run = replace(run, student=replace(run.student, size_rule="drop", shift_stages=()))
    why = cost_of(run, IMAGES, gpus=8, gpu="h100").why
    assert "size_rule 'drop', expected" in why
    assert "Set --student" not in why
