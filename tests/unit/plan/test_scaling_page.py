"""docs/scaling.md and the recipes' docstrings state what the plan computes."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fd_large.cli.plan_report import figures
from fd_large.cli.plan_workload import workload
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.memory import Placement, held
from fd_large.plan.peak_memory import FIXED_BYTES, HEADROOM
from fd_large.plan.rates import CARDS
from fd_large.plan.search import SAME_TIME, checkpoint_bytes, num_steps, search
from fd_large.plan.step_time import Between, estimate
from fd_large.recipes import registry

PAGE = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
GIANT = workload(registry.get("fd_swinv2g"))
CASES = ((1, 2048), (8, 2048), (64, 2048), (256, 2048), (256, 8192), (1024, 2048), (1024, 8192))


def said(between: Between) -> str:
    """A range as pages and docstrings have it."""
    return figures(between).replace("-", " to ")


def machine(gpus: int, gpu: str, gigabits: int) -> Machine:
    cluster = Cluster(gpus=gpus, gpus_per_node=8, nic_gigabits=gigabits, nics_per_node=8)
    return Machine(cluster=cluster, rates=CARDS[gpu])


@pytest.mark.parametrize(("gpus", "images"), CASES)
def test_the_table_of_the_page(gpus, images):
    good, _ = search(replace(GIANT, global_batch_size=images), machine(gpus, "h100", 400))
    best, seconds, chosen = good[0], good[0].seconds, good[0].candidate
    hours = seconds.between.scaled(num_steps(300, 1_281_167, images) / 3600)
    cells = (
        f"{gpus:,}",
        f"{images:,}",
        f"{chosen.stage}{' + hpZ' if chosen.hpz else ''}, {chosen.teacher}, "
        f"{'checkpoints' if chosen.checkpointing else 'none'}",
        f"{chosen.micro_batch_size} x {seconds.accumulation}",
        f"{best.memory.states / 1e9:.1f} + {best.memory.teacher / 1e9:.1f} + "
        f"{best.memory.activations / 1e9:.1f} + {best.memory.buffers / 1e9:.1f} = "
        f"{best.memory.total / 1e9:.1f}",
        " + ".join(f"{part * 1e3:,.0f}" for part in seconds.parts.values()),
        f"{seconds.communication * 1e3:,.0f}, {seconds.finish * 1e3:,.0f}",
        f"{100 * best.mfu:.0f} %",
        said(seconds.between),
        said(hours),
        said(hours.scaled(gpus)),
    )
    assert "| " + " | ".join(cells) + " |" in PAGE.read_text().splitlines()


SETTINGS = (
    Candidate(stage=2, teacher="replicated", checkpointing=False),
    Candidate(stage=1, teacher="replicated", checkpointing=False),
    Candidate(stage=2, teacher="replicated", checkpointing=True),
    Candidate(stage=2, teacher="sharded", checkpointing=False),
    Candidate(stage=3, teacher="replicated", checkpointing=False),
    Candidate(stage=3, teacher="sharded", checkpointing=False),
    Candidate(stage=3, hpz=True, teacher="node", checkpointing=False),
    Candidate(stage=3, hpz=True, teacher="node", checkpointing=True),
    Candidate(stage=3, teacher="sharded", checkpointing=True),
)
COLUMNS = tuple(
    (gpus, images, *card)
    for card in (("h100", 400), ("a100_40", 100))
    for gpus, images in ((8, 2048), (64, 2048), (512, 16384))
)


def column(gpus, images, gpu, gigabits):
    """The cells of one machine, and the setting that it is planned with."""
    good, _ = search(replace(GIANT, global_batch_size=images), machine(gpus, gpu, gigabits))
    found = {replace(one.candidate, micro_batch_size=1): one for one in good}
    steps = num_steps(300, 1_281_167, images)
    cells = []
    for setting in SETTINGS:
        if one := found.get(setting):
            hours = one.seconds.between.scaled(steps / 3600 * gpus)
            cells.append(f"{said(hours)}; {one.memory.total / 1e9:.1f}")
        else:
            cells.append("-")
    return cells, found


def test_the_table_of_settings_on_8_64_and_512_gpus():
    columns = [column(*each) for each in COLUMNS]
    lines = PAGE.read_text().splitlines()
    for setting, *cells in zip(SETTINGS, *(cells for cells, _ in columns), strict=True):
        name = f"{setting.stage}{' + hpZ' if setting.hpz else ''}, {setting.teacher}"
        kept = "checkpoints" if setting.checkpointing else "none"
        assert f"| {name}, {kept} | {' | '.join(cells)} |" in lines
    for _, found in columns:
        fastest = min(one.seconds.total for one in found.values())
        # Of settings that are equally fast, the one that communicates less is planned.
        assert found[SETTINGS[0]].seconds.total <= fastest * (1 + SAME_TIME)


def test_the_page_s_arithmetic_of_one_small_gpu():
    place = Placement(
        stage=3,
        world_size=1,
        node_size=1,
        bfloat16=True,
        teacher_bfloat16=True,
        persistence_threshold=GIANT.threshold,
        offload_optimizer=True,
        bucket_size=100_000_000,  # zero3_nvme.json has contiguous gradients.
    )
    memory = held(GIANT.student_sizes, GIANT.teacher_sizes, place)
    device, activations = memory.device, GIANT.counts[True].peak_at(32)
    # Gathered layers of 1e8 elements (`stage3_max_live_parameters`), and two more buckets.
    parts = {
        "weights": device.parameters,
        "teacher": device.teacher,
        "bucket": device.buckets,
        "images": activations,
        "transit": 3 * 200_000_000,
        "libraries": FIXED_BYTES,
    }
    section = PAGE.read_text().split("## SwinV2-G on one GPU")[1].split("## ")[0]
    found = [float(number) for number in re.findall(r"\b\d+\.\d\b", section)]
    total = sum(parts.values())
    expected = [*parts.values(), total, HEADROOM * 24e9, 16 * GIANT.parameters, memory.host.total]
    assert found == [round(n / 1e9, 1) for n in (*expected, checkpoint_bytes(GIANT))]


@pytest.mark.parametrize(
    ("teacher", "checkpointing"), [("node", True), ("node", False), ("replicated", False)]
)
def test_the_table_of_the_recipe(teacher, checkpointing):
    candidate = Candidate(
        stage=3, hpz=True, teacher=teacher, checkpointing=checkpointing, micro_batch_size=32
    )
    one = estimate(GIANT, candidate, machine(64, "a100_40", 100))
    memory = one.memory
    parts = (memory.states, memory.teacher, memory.activations, memory.buffers, memory.total)
    hours = one.seconds.between.scaled(num_steps(300, 1_281_167, 2048) / 3600 * 64)
    cells = (
        teacher,
        "every block" if checkpointing else "none",
        *(f"{bytes_ / 1e9:.1f}" for bytes_ in parts),
        said(hours),
    )
    docstring = inspect.getdoc(registry.RECIPES["fd_swinv2g"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in docstring]
    assert list(cells) in rows


# Without GPUs, and without a memory: it states the images of a rank, not of a micro-batch.
# The third takes its numbers from the images of its user.
NOT_PLANNED = ("quickstart", "linear_probe", "small_data")


def planned(name):
    """A recipe as its docstring describes it: GPUs, images of each, the JSON that it names."""
    run, facts = registry.get(name), registry.facts(name)
    gpus, memory, share = re.match(
        r"(\d+) GPUs(?: of (\d+) GB)?.* x (\d+) image", facts.hardware
    ).groups()
    json_name = re.search(r"ds_configs/(zero\d\w*)\.json", registry.RECIPES[name].__doc__)
    stage = json_name[1] if json_name else "zero1"
    there = machine(int(gpus), "a100_40" if memory == "40" else "a100", 100)
    load = workload(run, there.rates)
    placements = {getattr(model, "placement", "replicated") for model in run.frozen_models.values()}
    candidate = Candidate(
        stage=int(stage[4]),
        hpz=stage.endswith("hpz"),
        teacher=placements.pop() if placements else "replicated",
        checkpointing=run.student.activation_checkpointing != "off",
    )
    share = load.counts[False].images or int(share)
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    tried = (estimate(load, replace(candidate, micro_batch_size=s), there) for s in sizes)
    one = next(one for one in tried if one.memory.fits(there.rates))
    steps = int(facts.duration.split(" ")[0].replace(",", ""))
    return one, one.seconds.between.scaled(steps / 3600 * int(gpus))


@pytest.mark.parametrize("name", [name for name in registry.RECIPES if name not in NOT_PLANNED])
def test_a_recipe_states_memory_and_duration_as_planned(name):
    facts = registry.facts(name)
    one, hours = planned(name)
    if "GPU-minutes" in facts.duration:
        assert f"; {said(hours.scaled(60))} GPU-minutes" in facts.duration
    else:
        assert f"; {said(hours)} GPU-hours" in facts.duration
    gigabytes = float(re.fullmatch(r"([\d.]+) GB of each GPU", facts.memory)[1])
    assert gigabytes == pytest.approx(one.memory.total / 1e9, rel=0.05)


def test_the_linear_probe_states_flops_and_duration_as_planned():
    text, (_, hours) = inspect.getdoc(registry.RECIPES["linear_probe"]), planned("linear_probe")
    load = workload(registry.get("linear_probe"))
    # Published: 17.6 G multiply-adds of a ViT-B/16 at 224, head and attention included.
    gflop = load.counts[False].flops_per_image("inference") / 1e9
    assert gflop == pytest.approx(2 * 17.58, rel=0.005)
    assert f"Work: {gflop:.1f} GFLOP" in text
    assert f"; {said(hours)} GPU-hours" in text
    best = search(load, machine(8, "h100", 400))[0][0]
    steps = num_steps(90, 1_281_167, 16384)
    evaluation = PAGE.with_name("evaluation.md").read_text()
    hours = best.seconds.between.scaled(steps / 3600 * 8)
    assert f"{said(hours)} for the probe" in evaluation


def test_the_recipe_says_what_is_planned_first_on_its_own_cards():
    best = search(GIANT, machine(64, "a100_40", 100))[0][0]
    assert (best.candidate.stage, best.candidate.teacher) == (2, "replicated")
    assert not best.candidate.checkpointing
    hours = said(best.seconds.between.scaled(num_steps(300, 1_281_167, 2048) / 3600 * 64))
    text = " ".join(inspect.getdoc(registry.RECIPES["fd_swinv2g"]).split())
    assert f"it is {best.memory.total / 1e9:.1f} GB and {hours} GPU-hours" in text


def test_the_recipe_says_what_larger_cards_are_planned_with():
    there, steps = machine(64, "h100", 400), num_steps(300, 1_281_167, 2048)
    best = search(GIANT, there)[0][0]
    own = estimate(GIANT, planned("fd_swinv2g")[0].candidate, there)
    assert (best.candidate.stage, best.candidate.teacher) == (2, "replicated")
    assert not best.candidate.checkpointing
    best_hours, own_hours = (
        said(one.seconds.between.scaled(steps / 3600 * 64)) for one in (best, own)
    )
    text = " ".join(inspect.getdoc(registry.RECIPES["fd_swinv2g"]).split())
    assert f"no checkpoints: {best.memory.total / 1e9:.1f} GB, {best_hours} GPU-hours" in text
    assert f"take {own.memory.total / 1e9:.1f} GB of H100s there and {own_hours} GPU-hours" in text
