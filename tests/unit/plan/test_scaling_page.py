"""docs/scaling.md and the docstring of fd_swinv2g show what the plan computes, line by line."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest

from fd_large.cli.plan import workload
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.rates import CARDS
from fd_large.plan.search import num_steps, search
from fd_large.plan.step_time import estimate
from fd_large.recipes import registry

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
GIANT = workload(registry.get("fd_swinv2g"))
CASES = ((1, 2048), (8, 2048), (64, 2048), (256, 2048), (256, 8192), (1024, 2048), (1024, 8192))


def machine(gpus: int, gpu: str, gigabits: int) -> Machine:
    cluster = Cluster(gpus=gpus, gpus_per_node=8, nic_gigabits=gigabits, nics_per_node=8)
    return Machine(cluster=cluster, rates=CARDS[gpu])


@pytest.mark.parametrize(("gpus", "images"), CASES)
def test_the_table_of_the_page(gpus, images):
    good, _ = search(replace(GIANT, global_batch_size=images), machine(gpus, "h100", 400))
    best, seconds, chosen = good[0], good[0].seconds, good[0].candidate
    hours = seconds.total * num_steps(300, 1_281_167, images) / 3600
    cells = (
        f"{gpus:,}",
        f"{images:,}",
        f"{chosen.stage}{' + hpZ' if chosen.hpz else ''}, {chosen.teacher}, "
        f"{'checkpoints' if chosen.checkpointing else 'none'}",
        f"{chosen.micro_batch_size} x {seconds.accumulation}",
        f"{best.memory.states / 1e9:.1f} + {best.memory.teacher / 1e9:.1f} + "
        f"{best.memory.activations / 1e9:.1f} + {best.memory.buffers / 1e9:.1f} = "
        f"{best.memory.total / 1e9:.1f}",
        f"{seconds.products * 1e3:,.0f} + {seconds.rest * 1e3:,.0f}",
        f"{seconds.communication * 1e3:,.0f}, {seconds.finish * 1e3:,.0f}",
        f"{seconds.total:,.2f}",
        f"{best.images_per_second:,.0f}",
        f"{100 * best.mfu:.0f} %",
        f"{hours:,.1f}",
        f"{hours * gpus:,.0f}",
    )
    assert "| " + " | ".join(cells) + " |" in PAGE.read_text().splitlines()


@pytest.mark.parametrize(
    ("teacher", "checkpointing"), [("node", True), ("node", False), ("replicated", False)]
)
def test_the_table_of_the_recipe(teacher, checkpointing):
    candidate = Candidate(
        stage=3, hpz=True, teacher=teacher, checkpointing=checkpointing, micro_batch_size=32
    )
    one = estimate(GIANT, candidate, machine(64, "a100_40", 100))
    memory = one.memory
    figures = (memory.states, memory.teacher, memory.activations, memory.buffers, memory.total)
    hours = one.seconds.total * num_steps(300, 1_281_167, 2048) / 3600 * 64
    cells = (
        teacher,
        "every block" if checkpointing else "none",
        *(f"{bytes_ / 1e9:.1f} GB" for bytes_ in figures),
        f"{hours:,.0f}",
    )
    docstring = inspect.getdoc(registry.RECIPES["fd_swinv2g"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in docstring]
    assert list(cells) in rows
