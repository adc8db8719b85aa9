"""Candidates of a workload on a cluster: arithmetic against figures by hand, choices, refusals."""

import json
from dataclasses import replace

import pytest

from fd_large.cli.plan_workload import workload
from fd_large.engine.zero import config as ds
from fd_large.errors import ConfigError
from fd_large.plan.buckets import gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import PER_NODE_SECONDS, Cluster, Machine
from fd_large.plan.counts import Line
from fd_large.plan.memory import held, persistence_threshold
from fd_large.plan.peak_memory import peak_memory, placement_of
from fd_large.plan.rates import CARDS, rates_of
from fd_large.plan.search import search
from fd_large.plan.step_time import HOOKS, PRODUCTS, REST, WHOLE_BLOCK, estimate
from fd_large.recipes import registry

GIANT = workload(registry.get("fd_swinv2g"))
IDEAL = replace(CARDS["h100"], network_share=1.0, link=350e9)
CPU = replace(CARDS["h100"], overlap=False, bfloat16=False)


def cluster(gpus, *, gigabits=400, nics=8):
    return Cluster(gpus=gpus, gpus_per_node=8, nic_gigabits=gigabits, nics_per_node=nics)


def machine(gpus, *, rates=CARDS["h100"], **network):
    return Machine(cluster=cluster(gpus, **network), rates=rates)


def milliseconds(phases, gpus, **network):
    there = cluster(gpus, **network)
    start = IDEAL.start_seconds + PER_NODE_SECONDS * (there.nodes - 1)
    return 1e3 * phases * (there.seconds(6.0e9, IDEAL) - start)


@pytest.mark.parametrize(
    ("phases", "nodes", "gigabits", "nics", "expected"),
    [
        # Passes of 6.0 GB over 8 and 32 nodes: both models over all ranks; teacher inside; hpZ.
        (4, 8, 100, 8, 210),
        (4, 32, 100, 8, 232),
        (3, 8, 100, 8, 157),
        (2, 32, 100, 8, 116),
        (4, 8, 100, 1, 1679),
        (2, 32, 100, 1, 929),
        # Inside a node links decide; 8 x 400 Gb/s into a node are more than one rank's link takes.
        (1, 1, 400, 8, 1e3 * 6.0 * 7 / 8 / 350),
        (1, 8, 400, 8, 1e3 * 6.0 * 7 / 8 / 350),
    ],
)
def test_network_time_of_giant(phases, nodes, gigabits, nics, expected):
    found = milliseconds(phases, 8 * nodes, gigabits=gigabits, nics=nics)
    assert found == pytest.approx(expected, rel=0.005)
    assert cluster(1).seconds(6.0e9, IDEAL) == 0.0


def hooked(phase):
    """Modules of the giant that a pass runs hooks of."""
    counts = GIANT.counts[False]
    return counts.modules[phase] + WHOLE_BLOCK * counts.blocks[phase]


def test_giant_by_hand_on_64():
    candidate = Candidate(stage=3, hpz=True, teacher="node", micro_batch_size=32)
    one = estimate(GIANT, candidate, machine(64))
    # 3 x 744.2 + 743.0 GFLOP an image at 0.45 x 989 TFLOP/s, nearly all of it limited by that.
    assert one.seconds.parts[PRODUCTS] == pytest.approx(32 * 2.976e12 / 441e12, rel=0.05)
    # Two passes of the student, and one of the teacher, at 135 us a module.
    passes = 2 * hooked("forward") + hooked("inference")
    assert one.seconds.parts[HOOKS] == pytest.approx(135e-6 * passes)
    assert one.flops.model / 32 == pytest.approx(2.976e12, rel=0.005)
    assert one.seconds.total == one.seconds.computation + one.seconds.finish
    assert one.images_per_second == pytest.approx(2048 / one.seconds.total)
    assert one.mfu == pytest.approx(one.flops.model / one.seconds.total / 989e12)
    assert one.seconds.accumulation == 1
    states = one.memory.states + one.memory.teacher
    assert states == pytest.approx((54 / 64 + 6 / 8 + 6 / 8) * 1e9, rel=0.05)


def test_the_longer_of_computation_and_communication_counts():
    candidate = Candidate(stage=3, teacher="sharded", micro_batch_size=32)
    slow = estimate(GIANT, candidate, machine(64, gigabits=100, nics=1)).seconds
    assert slow.communication > slow.computation
    assert slow.total == pytest.approx(slow.communication + slow.finish)
    both = estimate(GIANT, candidate, machine(64, rates=CPU)).seconds
    assert both.total == both.computation + both.communication + both.finish


def test_cheaper_hooks_are_counted_where_they_are_known():
    candidate = Candidate(stage=3, hpz=True, micro_batch_size=32)
    known = replace(CARDS["h100"], hooked_share=0.6)
    now, less = (estimate(GIANT, candidate, machine(64, rates=r)) for r in (CARDS["h100"], known))
    assert less.seconds.parts[HOOKS] == pytest.approx(0.6 * now.seconds.parts[HOOKS])


def test_checkpoints_cost_a_forward_and_save_memory():
    without = Candidate(stage=3, micro_batch_size=16)
    with_them = replace(without, checkpointing=True)
    a, b = (estimate(GIANT, each, machine(64)) for each in (without, with_them))
    assert b.seconds.parts[PRODUCTS] / a.seconds.parts[PRODUCTS] == pytest.approx(5 / 4, rel=0.01)
    assert b.memory.activations < 0.3 * a.memory.activations
    assert a.mfu > b.mfu
    assert b.hardware_utilisation > 1.2 * b.mfu


def test_fused_kernels_are_faster_and_hold_less():
    candidate = Candidate(stage=2, micro_batch_size=32)
    reference = workload(registry.get("fd_swinv2g"), kernels="reference")
    fused, plain = (estimate(load, candidate, machine(64)) for load in (GIANT, reference))
    assert plain.seconds.parts[REST] > 3 * fused.seconds.parts[REST]
    assert plain.memory.activations > fused.memory.activations


@pytest.mark.parametrize("gpus", [1, 8, 64, 256, 1024])
def test_giant_finds_a_place(gpus):
    good, bad = search(GIANT, machine(gpus))
    assert good
    for one in good:
        assert one.memory.fits(CARDS["h100"])
        assert one.candidate.micro_batch_size * one.seconds.accumulation * gpus == 2048
    assert good[0].seconds.total <= 1.01 * min(o.seconds.total for o in good)
    for one in bad:
        assert not peak_memory(GIANT, one.candidate, machine(gpus)).fits(CARDS["h100"])


def test_what_does_not_fit_says_why():
    good, bad = search(GIANT, machine(1, rates=CARDS["a100_40"]))
    assert not good
    assert {one.candidate.stage for one in bad} == {1, 2, 3}
    assert "GB for one image (states 5" in bad[-1].reason
    assert "36.8" in bad[-1].reason
    good, bad = search(GIANT, machine(2, rates=CARDS["a100_40"]))
    assert {one.candidate.stage for one in good} == {3}
    assert {(one.candidate.stage, one.candidate.teacher) for one in bad} == {
        *((stage, teacher) for stage in (1, 2) for teacher in ("replicated", "sharded")),
        (3, "replicated"),
    }


def test_a_narrow_network_prefers_what_communicates_least():
    there = machine(64, gigabits=100, nics=8)
    best = search(GIANT, there)[0][0]
    full = Candidate(stage=3, teacher="sharded", micro_batch_size=best.candidate.micro_batch_size)
    assert best.seconds.communication < estimate(GIANT, full, there).seconds.communication


def test_ranks_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r" 2048 .* 24 ranks.*batch_size 2040"):
        search(GIANT, machine(24))


@pytest.mark.parametrize(("images", "planned"), [(384, 128), (192, 96), (64, 64)])
def test_counts_of_one_micro_batch_alone_plan_no_larger_one(images, planned):
    load = workload(registry.get("linear_probe"))
    assert load.counts[False].images == 128
    good, _ = search(replace(load, global_batch_size=images), machine(1))
    assert {one.candidate.micro_batch_size for one in good} == {planned}


@pytest.mark.parametrize("card", ["h100", "l40s"])
@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_can_be_planned(name, card):
    run, rates = registry.get(name), CARDS[card]
    gpus = 8 if run.batch.global_batch_size % 8 == 0 else 1
    good, bad = search(workload(run, rates), machine(gpus, rates=rates))
    assert good or min(one.reason for one in bad)
    for one in (*good, *bad):
        assert run.frozen_models or one.candidate.teacher == "replicated"


def test_the_json_of_a_candidate_is_accepted(tmp_path):
    for stage, hpz in ((1, False), (2, False), (3, False), (3, True)):
        candidate = Candidate(stage=stage, hpz=hpz, micro_batch_size=32)
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(candidate.deepspeed()))
        sizes = GIANT.student_sizes + GIANT.teacher_sizes
        numbers = ds.RunNumbers(32, 1, 64, 8, 3.0, True, sizes, trained_sizes=GIANT.student_sizes)
        filled = ds.fill(ds.load(path), numbers)
        zero = filled["zero_optimization"]
        assert zero["stage"] == stage
        assert zero["reduce_bucket_size"] == 100_000_000
        assert zero.get("zero_hpz_partition_size", 1) == (8 if hpz else 1)
        if stage == 3:
            assert zero["stage3_param_persistence_threshold"] == GIANT.threshold
            assert zero["stage3_prefetch_bucket_size"] == 51_000_000


def test_persistence_keeps_at_most_one_percent():
    sizes = [100] * 50 + [10] * 20 + [100_000]
    assert persistence_threshold(sizes) == 10, "50 tensors of 100 would pass 1% of 105,200"
    assert persistence_threshold([5]) == 0
    assert persistence_threshold([1, 1000]) == 1


@pytest.mark.parametrize(("gpus", "sums"), [(8, 1.0), (16, 2.0)])
def test_gradients_travel_as_the_stage_sends_them(gpus, sums):
    """Passes of S: an all-reduce is two, a gather, a scatter and a sum on its owner one each."""
    wide = replace(CARDS["h100"], link=1e9, network_share=1.0)
    there = machine(gpus, rates=wide)
    one = there.cluster.seconds(2 * GIANT.parameters, wide)
    passes = {}
    for stage in (1, 2, 3):
        seconds = estimate(GIANT, Candidate(stage=stage, micro_batch_size=32), there).seconds
        passes[stage] = (round(seconds.communication / one, 1), round(seconds.finish / one, 1))
    # 0.5e9 of 3.01e9 parameters are still whole when backward of stage 3 begins.
    assert passes == {1: (0.0, sums + 1), 2: (sums, 1.0), 3: (2.8, 0.0)}


@pytest.mark.parametrize(("group", "sizes"), [(1, {1, 2, 4, 8}), (4, {4, 8}), (16, {8})])
def test_a_micro_batch_holds_whole_groups_of_batch_norms_or_the_whole_share(group, sizes):
    load = replace(GIANT, global_batch_size=8 * 64, norm_group=group)
    good, _ = search(load, machine(64))
    assert good
    assert {one.candidate.micro_batch_size for one in good} <= sizes


def test_every_divisor_is_a_micro_batch():
    good, _ = search(replace(GIANT, global_batch_size=3 * 64), machine(64))
    assert good[0].candidate.micro_batch_size == 3


def test_the_peak_starts_from_the_states_between_steps():
    candidate = Candidate(stage=2, teacher="sharded", micro_batch_size=4)
    there = machine(16)
    place = placement_of(GIANT, candidate, there)
    memory = held(GIANT.student_sizes, GIANT.teacher_sizes, place)
    peak = peak_memory(GIANT, candidate, there)
    assert peak.states + peak.teacher == memory.device.total - memory.device.buckets


def test_gradients_of_several_passes_are_all_there_in_float32_and_summed_at_once_in_bfloat16():
    """At stage 1; those of one pass in float32 go as soon as their bucket is complete."""
    load = replace(GIANT, global_batch_size=16 * 4)
    buffers = {}
    for rates in (CPU, CARDS["h100"]):
        there = machine(16, rates=rates)
        one, four = (
            peak_memory(load, Candidate(stage=1, micro_batch_size=size), there).buffers
            for size in (4, 1)
        )
        buffers[rates.bfloat16] = one, four
    one, four = buffers[False]
    assert four - one == 4 * (load.parameters - gradient_bucket(load.parameters))
    assert len(set(buffers[True])) == 1


def test_a_step_in_two_passes_holds_its_micro_batches_and_pays_a_forward():
    counts = GIANT.counts[False]
    first = [p._replace(phase="first_pass") for p in counts.products if p.phase == "forward"]
    two = replace(
        counts,
        products=(*counts.products, *first),
        modules={**counts.modules, "first_pass": counts.modules["forward"]},
        held=Line(0, 1000),
    )
    load = replace(GIANT, counts={**GIANT.counts, False: two})
    # A step of 32 images: one micro-batch needs no first pass, four do.
    for size, held_images, passes in ((32, 0, 0), (8, 24, 1)):
        candidate = Candidate(stage=3, micro_batch_size=size)
        one, other = (estimate(each, candidate, machine(64)) for each in (GIANT, load))
        assert other.memory.activations - one.memory.activations == 1000 * held_images
        forward = counts.flops("forward", size)
        assert other.flops.hardware - one.flops.hardware == passes * forward
        assert other.flops.model == one.flops.model
        slower = (other.seconds.communication, other.seconds.parts[PRODUCTS])
        faster = (one.seconds.communication, one.seconds.parts[PRODUCTS])
        assert (slower > faster) == bool(passes)


def test_the_largest_of_several_teachers_are_split_first():
    large, small = ((10_000_000, 300),), ((10_000_000, 30),)
    load = replace(
        GIANT,
        counts={c: replace(one, frozen=(small, large)) for c, one in GIANT.counts.items()},
    )
    there = machine(2)
    split = Candidate(stage=3, teacher="sharded", micro_batch_size=8)
    found = [
        estimate(load, one, there)
        for one in (split, replace(split, whole=1), replace(split, teacher="replicated"))
    ]
    # 3B and 300M in bfloat16.
    assert [one.memory.teacher / 1e9 for one in found] == pytest.approx([3.3, 3.6, 6.6])
    seconds = [one.seconds.communication for one in found]
    assert seconds == sorted(seconds, reverse=True)
    gathered = [seconds[i] - seconds[2] for i in (0, 1)]
    assert gathered[1] / gathered[0] == pytest.approx(10 / 11, rel=0.01)
    good, bad = search(load, there)
    placements = {(one.candidate.teacher, one.candidate.whole) for one in (*good, *bad)}
    assert placements == {("replicated", 0), ("sharded", 0), ("sharded", 1)}


def test_flags_of_a_candidate_are_those_that_differ():
    recipe = {
        "micro_batch_size": 32,
        "placements": {"teacher": "node"},
        "activation_checkpointing": "every",
    }
    same = Candidate(stage=3, teacher="node", checkpointing=True, micro_batch_size=32)
    assert same.flags(**recipe) == []
    assert same.flags(**{**recipe, "activation_checkpointing": "offload"}) == []
    several = recipe | {"placements": {"teachers.a": "node", "teachers.b": "sharded"}}
    assert same.flags(**several) == ["--teachers.b.placement node"]
    assert replace(same, whole=1).flags(**several, whole=["teachers.a"]) == [
        *("--teachers.a.placement replicated", "--teachers.b.placement node"),
    ]
    other = replace(same, checkpointing=False, micro_batch_size=16)
    assert other.flags(**recipe) == [
        "--batch.micro_batch_size 16",
        "--student.activation_checkpointing off",
    ]


def test_rates_come_from_card_and_file(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text('{"matmul": 7e14, "name": "mine"}')
    rates = rates_of("h100", str(path))
    assert (rates.matmul, rates.name, rates.bandwidth) == (7e14, "mine", CARDS["h100"].bandwidth)
    for text, message in (
        ('{"matmull": 1}', "matmull: .*nearest: "),
        ('{"matmul": "fast"}', "matmul: .*got 'fast'"),
        ('{"overlap": 1}', "overlap: .*got 1, expected true or false"),
        ('{"name": 1}', "name: .*got 1"),
        ('{"matmul": 0}', "matmul: .*got 0, expected a number above 0"),
        ('{"matmul": NaN}', "matmul: .*got nan"),
        ("[1]", "--rates: "),
        ("{", "--rates: "),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            rates_of("h100", str(path))
    with pytest.raises(ConfigError, match=r"--rates: "):
        rates_of("h100", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"--gpu: .*got 'h1000', nearest: h100"):
        rates_of("h1000")


def test_one_float32_rank_is_planned_at_stage_0():
    good, bad = search(GIANT, machine(1, rates=CPU))
    assert {one.candidate.stage for one in (*good, *bad)} == {0, 3}
    assert Candidate(stage=0).deepspeed()["zero_optimization"] == {"stage": 0}
