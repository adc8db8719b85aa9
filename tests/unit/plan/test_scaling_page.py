"""docs/scaling.md shows what the plan says: its table is compared line by line."""

from dataclasses import replace
from pathlib import Path

from fd_large.plan.cluster import Cluster
from fd_large.plan.rates import CARDS
from fd_large.plan.search import search, updates
from fd_large.plan.setting import Machine, Workload
from fd_large.recipes import registry

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
CASES = ((1, 2048), (8, 2048), (64, 2048), (256, 2048), (256, 8192), (1024, 2048), (1024, 8192))


def line(gpus: int, images: int) -> str:
    run = registry.get("fd_swinv2g")
    run = replace(run, batch=replace(run.batch, global_batch_size=images))
    load = Workload.of(run)
    network = Cluster(gpus=gpus, gpus_per_node=8, nic_gigabits=400, nics_per_node=8)
    good, _ = search(load, Machine(cluster=network, rates=CARDS["h100"], kernels="fused"))
    best, seconds = good[0], good[0].seconds
    hours = seconds.total * updates(load, 1_281_167) / 3600
    setting = best.setting
    cells = (
        f"{gpus:,}",
        f"{images:,}",
        f"{setting.stage}{' + hpZ' if setting.hpz else ''}, {setting.teacher}, "
        f"{'checkpoints' if setting.checkpointing else 'none'}",
        f"{setting.micro_batch_size} x {seconds.accumulation}",
        f"{best.memory.states / 1e9:.1f} + {best.memory.teacher / 1e9:.1f} + "
        f"{best.memory.activations / 1e9:.1f} + {best.memory.buffers / 1e9:.1f} = "
        f"{best.memory.total / 1e9:.1f}",
        f"{seconds.products * 1e3:,.0f} + {seconds.rest * 1e3:,.0f}",
        f"{seconds.communication * 1e3:,.0f}, {seconds.update * 1e3:,.0f}",
        f"{seconds.total:,.2f}",
        f"{best.images_per_second:,.0f}",
        f"{100 * best.mfu:.0f} %",
        f"{hours:,.1f}",
        f"{hours * gpus:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def test_the_table_is_the_plans():
    there = PAGE.read_text().splitlines()
    wanted = [line(*case) for case in CASES]
    assert [row for row in wanted if row not in there] == []
