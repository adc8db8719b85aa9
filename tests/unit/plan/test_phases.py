"""Lines through measured seconds, and what a step takes by them."""

import json
from dataclasses import replace

import pytest

from fd_large.cli.plan_workload import workload
from fd_large.errors import ConfigError
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.counts import Line
from fd_large.plan.phases import Phases, line, read
from fd_large.plan.rates import CARDS
from fd_large.plan.step_time import ADDED, HOOKS, WHOLE_BLOCK, estimate
from fd_large.plan.workload import together
from fd_large.recipes import registry

MEASURED = Phases(
    seconds={
        "teacher": Line(0.1, 0.01),
        "first pass": Line(0.0, 0.5),
        "forward": Line(0.2, 0.02),
        "backward": Line(0.3, 0.04),
    },
    update=1e-9,
)
GIANT = replace(workload(registry.get("fd_swinv2g")), phases=MEASURED)


def machine(gpus, rates=CARDS["h100"]):
    cluster = Cluster(gpus=gpus, gpus_per_node=8, nic_gigabits=400, nics_per_node=8)
    return Machine(cluster=cluster, rates=rates)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({2: 0.5, 4: 0.7}, (0.3, 0.1)),
        ({4: 0.8}, (0.0, 0.2)),
        ({2: 0.3, 4: 0.8}, (0.0, 0.2)),  # No time before the first image.
        ({2: 0.8, 4: 0.7}, (0.7, 0.0)),  # Noise: no image takes less than none.
    ],
)
def test_a_line_goes_through_two_micro_batches(seconds, expected):
    assert line(seconds) == pytest.approx(expected)


def test_a_step_is_its_phases_and_what_zero_adds():
    alone = replace(CARDS["h100"], overlap=False, bfloat16=False)
    one = estimate(GIANT, Candidate(stage=0, micro_batch_size=8), machine(1, alone)).seconds
    assert one.parts == pytest.approx(
        {"teacher": 0.18, "forward": 0.36, "backward": 0.62, ADDED: 0.0}
    )
    assert one.finish == pytest.approx(1e-9 * GIANT.parameters)
    # Every block's forward again, but not those of the projection and of the loss.
    candidate = Candidate(stage=0, micro_batch_size=8, checkpointing=True)
    again = estimate(GIANT, candidate, machine(1, alone)).seconds
    assert 0.95 * 0.36 < again.parts["forward again"] < 0.36
    split = estimate(GIANT, Candidate(stage=3, micro_batch_size=8), machine(8, alone)).seconds
    assert split.parts[ADDED] > 0
    assert split.communication > 0
    assert split.finish < one.finish / 4


def test_small_micro_batches_on_a_gpu_wait_for_python():
    tiny = {name: Line(0.0, 1e-5) for name in ("forward", "backward")}
    load = replace(GIANT, phases=replace(MEASURED, seconds=tiny))
    found = estimate(load, Candidate(stage=1), machine(8)).seconds
    calls = sum(GIANT.counts[False].calls.values())
    assert found.computation == pytest.approx(calls * CARDS["h100"].launch_seconds)


def test_hooks_add_to_a_measured_step_however_long_it_is():
    one, three = (
        estimate(GIANT, Candidate(stage=stage, micro_batch_size=8), machine(8)).seconds
        for stage in (1, 3)
    )
    counts = GIANT.counts[False]
    passes = 2 * (counts.modules["forward"] + WHOLE_BLOCK * counts.blocks["forward"])
    assert three.parts[HOOKS] == pytest.approx(27 * CARDS["h100"].launch_seconds * passes)
    assert three.parts[HOOKS] < one.computation
    assert three.computation > one.computation + three.parts[HOOKS]
    assert HOOKS not in one.parts


def test_students_share_the_teachers_and_nothing_else():
    slower = replace(MEASURED, update=4e-9)
    small = replace(workload(registry.get("fd_swinv2_base")), phases=slower)
    both = together([GIANT, small])
    assert both.phases.seconds["teacher"] == MEASURED.seconds["teacher"]
    assert both.phases.seconds["backward"] == Line(0.6, 0.08)
    # The optimiser's seconds of each: those of a small student count for little.
    one = 1e-9 * GIANT.parameters, 4e-9 * small.parameters
    assert both.phases.update * both.parameters == pytest.approx(sum(one))


def test_a_file_gives_back_the_phases_of_its_task_alone(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"phases": {"mine": MEASURED.to_plain()}}))
    assert read(str(path), "mine") == MEASURED
    assert read(str(path), "another") is None
    path.write_text('{"phases": {"mine": {"seconds": {"forward": 1}}}}')
    with pytest.raises(ConfigError, match=r"--rates: .*phases"):
        read(str(path), "mine")
