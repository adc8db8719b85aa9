"""Bytes between steps: the formulas on sizes small enough to add up by hand."""

from dataclasses import replace

import pytest

from fd_large.cli.plan_workload import workload
from fd_large.errors import ConfigError
from fd_large.plan.memory import Held, Placement, held
from fd_large.recipes import registry
from fd_large.tasks.distillation.section import Teacher

STUDENT = [1000, 10, 7]  # P = 1017; tensors of at most 10 elements: 17
TEACHER = [600, 9]  # T = 609
SPLIT = 500 + 5 + 4  # of the student over 2 ranks, tensor by tensor, rounded up


def place(stage, bfloat16=False, **values) -> Placement:
    defaults = {
        "world_size": 2,
        "node_size": 2,
        "teacher_bfloat16": bfloat16,
        "persistence_threshold": 10,
        "teacher_persistence_threshold": 10,
        "bucket_size": 100,
    }
    return Placement(stage=stage, bfloat16=bfloat16, **{**defaults, **values})


@pytest.mark.parametrize(
    ("stage", "bfloat16", "expected"),
    [
        (0, False, {"parameters": 4 * 1017, "moments": 8 * 1017, "gradients": 4 * 1017}),
        (1, False, {"parameters": 4 * 1017, "moments": 8 * 509,
                    "gradients": 4 * 509, "buckets": 800}),
        (2, False, {"parameters": 4 * 1017, "moments": 8 * 509,
                    "gradients": 4 * 509, "buckets": 800}),
        (1, True, {"parameters": 2 * 1017, "masters": 4 * 509, "moments": 8 * 509,
                   "gradients": 4 * 1017}),
        (2, True, {"parameters": 2 * 1017, "masters": 4 * 509, "moments": 8 * 509,
                   "gradients": 4 * 509, "buckets": 400}),
        (3, False, {"parameters": 4 * (SPLIT + 17), "masters": 4 * SPLIT, "moments": 8 * SPLIT,
                    "gradients": 4 * SPLIT, "buckets": 400}),
        (3, True, {"parameters": 2 * (SPLIT + 17), "masters": 4 * SPLIT, "moments": 8 * SPLIT,
                   "gradients": 4 * SPLIT, "buckets": 200}),
    ],
)  # fmt: skip
def test_what_a_rank_holds_at_each_stage(stage, bfloat16, expected):
    memory = held(STUDENT, TEACHER, place(stage, bfloat16))
    teacher = (2 if bfloat16 else 4) * 609
    assert memory.device == Held(teacher=teacher, **expected)
    assert memory.host == Held()
    assert memory.device.total == teacher + sum(expected.values())


def test_offload_moves_shards_and_optimizer_to_the_host():
    memory = held(STUDENT, TEACHER, place(3, True, offload_optimizer=True, offload_param=True))
    assert memory.device == Held(parameters=2 * 17, teacher=2 * 609, buckets=200)
    assert memory.host == Held(
        parameters=2 * SPLIT, masters=4 * SPLIT, moments=8 * SPLIT, gradients=8 * SPLIT
    )


def test_a_disk_takes_one_gradient_with_the_state():
    memory = held(STUDENT, TEACHER, place(3, offload_optimizer=True, optimizer_on_disk=True))
    assert memory.host == Held()
    state = Held(masters=4 * SPLIT, moments=8 * SPLIT, gradients=4 * SPLIT)
    assert memory.disk == state
    json = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "nvme"},
        "stage3_param_persistence_threshold": 10,
    }
    there = Placement.of(
        Teacher(dtype="bfloat16"),
        json,
        world_size=2,
        node_size=2,
        bfloat16=True,
        teacher_persistence_threshold=10,
        float32_sums=False,
    )
    memory = held(STUDENT, TEACHER, there)
    assert memory.disk == replace(state, parameters=2 * SPLIT)
    assert memory.device.parameters == 2 * 17


def test_offload_at_stage_2_leaves_the_parameters_on_the_device():
    memory = held(STUDENT, TEACHER, place(2, True, offload_optimizer=True))
    assert memory.device == Held(parameters=2 * 1017, teacher=2 * 609, buckets=2 * 1000)
    assert memory.host == Held(
        masters=4 * 509, moments=8 * 509, gradients=4 * 509, buckets=2 * (509 + 1000)
    )


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("replicated", 4 * 609),
        ("sharded", 4 * (150 + 3 + 9)),  # a quarter, and the tensor of 9 whole
        ("node", 4 * (300 + 5 + 9)),  # half
    ],
)
def test_where_the_teacher_lies(placement, expected):
    spot = place(3, world_size=4, node_size=2, teacher_placement=placement)
    assert held(STUDENT, TEACHER, spot).device.teacher == expected


def test_a_teacher_split_over_one_rank_is_whole():
    spot = place(3, world_size=1, node_size=1, teacher_placement="sharded")
    assert held(STUDENT, TEACHER, spot).device.teacher == 4 * 609


def test_hpz_costs_its_copy_during_the_step_only():
    with_hpz = held(STUDENT, TEACHER, place(3, True, world_size=4, hpz_size=2))
    without = held(STUDENT, TEACHER, place(3, True, world_size=4))
    assert with_hpz.device == without.device
    assert (without.hpz_copy, with_hpz.hpz_copy) == (0, 2 * SPLIT)


def test_a_bucket_has_the_data_type_of_the_sums():
    narrow, wide = (held(STUDENT, TEACHER, place(3, True, float32_sums=s)) for s in (False, True))
    assert (narrow.device.buckets, wide.device.buckets) == (200, 400)
    assert narrow.device.total + 200 == wide.device.total


def test_giant_on_64_gpus_holds_what_its_recipe_says():
    run = registry.get("fd_swinv2g")
    zero = {"stage": 3, "zero_hpz_partition_size": 8, "reduce_bucket_size": 100_000_000}
    spot = Placement.of(
        run.teacher,
        zero,
        world_size=64,
        node_size=8,
        bfloat16=True,
        teacher_persistence_threshold=100_000,
        float32_sums=False,
    )
    load = workload(run)
    memory = held(load.student_sizes, load.teacher_sizes, spot)
    states = memory.device.total - memory.device.teacher - memory.device.buckets
    assert states / 1e9 == pytest.approx(54.0 / 64, rel=0.02)
    assert memory.device.teacher / 1e9 == pytest.approx(0.75, rel=0.02)
    assert memory.hpz_copy / 1e9 == pytest.approx(0.75, rel=0.02)


def test_an_unfilled_auto_is_refused():
    with pytest.raises(ConfigError, match="zero_hpz_partition_size"):
        Placement.of(
            Teacher(),
            {"zero_hpz_partition_size": "auto"},
            world_size=8,
            node_size=8,
            bfloat16=True,
            teacher_persistence_threshold=0,
            float32_sums=False,
        )
