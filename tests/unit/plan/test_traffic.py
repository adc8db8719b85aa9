"""Bytes moved and kept: the tables against the count of benchmarks/roofline.py."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from fd_large.cli.plan import workload
from fd_large.plan import traffic
from fd_large.plan.rates import CARDS
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[3]
# So many that what a step moves once (position tables, partial sums) does not show in an image's
# share; shapes alone are followed, so it costs nothing.
BATCH = 512


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("roofline")


@pytest.fixture(autouse=True)
def _kernels_as_found(monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "reference")  # `count` sets it; this puts it back.


def shrunken(name, **fields):
    run = registry.get(name)
    student, teacher = (
        replace(part, architecture=replace(part.architecture, **fields))
        for part in (run.student, run.teacher)
    )
    return replace(run, student=student, teacher=teacher)


RUNS = {
    "swinv2": shrunken(
        "fd_swinv2_base", embed_dim=64, depths=(2, 2, 8, 2), num_heads=(2, 4, 8, 16)
    ),
    "vit and clip": shrunken("fd_clip_vit_base", embed_dim=128, depths=(12,), num_heads=(4,)),
    "vit and dino": shrunken("fd_dino_vit_base", embed_dim=128, depths=(12,), num_heads=(4,)),
    "swinv2 and swin": shrunken(
        "fd_esvit_swin_base", embed_dim=64, depths=(2, 2, 8, 2), num_heads=(2, 4, 8, 16)
    ),
}
PHASES = {"forward": "student forward", "backward": "student backward"}


def planned(run, phase, kernels):
    load, teaches = workload(run), phase == "inference"
    return traffic.moved(
        load.teacher if teaches else load.student,
        phase,
        image_size=load.teacher_image_size if teaches else load.image_size,
        kernels=kernels,
        bfloat16=True,
        float32_stream=not teaches and load.float32_stream,
    )


@pytest.mark.parametrize("stream", ["float32", "compute"])
@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("name", RUNS)
def test_bytes_moved_as_counted(roofline, name, kernels, stream):
    run = RUNS[name]
    run = replace(run, student=replace(run.student, residual_dtype=stream))
    wish = "triton" if kernels == "fused" else kernels
    rows = roofline.count(run, BATCH, CARDS["h100"], kernels=wish)
    for phase in ("forward", "backward", "inference"):
        counted = roofline.beside(rows, (PHASES.get(phase, "teacher forward"),)) / BATCH
        moved = sum(planned(run, phase, kernels).values())
        assert moved == pytest.approx(counted, rel=0.08), phase


def test_a_linear_layer_counts_by_hand(roofline):
    layer = torch.nn.Linear(32, 48, device="meta")
    x = torch.empty(16, 32, device="meta", requires_grad=True)
    counter = roofline.Counter(CARDS["h100"])
    with counter.named(layer):
        counter.phase = "student forward"
        with counter:
            y = layer(x).relu()
        counter.phase = "student backward"
        with counter:
            y.backward(torch.empty_like(y))
    rows = roofline.summed(counter.rows, lambda row: (row.phase.split()[1], row.op))
    product, weight, inputs, outputs = 2 * 16 * 32 * 48, 4 * 32 * 48, 4 * 16 * 32, 4 * 16 * 48
    forward = rows["forward", "addmm"]
    assert forward.flops == product
    assert (forward.read, forward.written) == (weight + 4 * 48 + inputs, outputs)
    assert rows["backward", "mm"].flops == 2 * product
    assert rows["backward", "mm"].moved == 2 * (weight + inputs + outputs)
    assert rows["backward", "sum"].moved == outputs + 4 * 48
    assert rows["backward", "sum"].kind == "bias gradient"
    assert rows["forward", "relu"].moved == 2 * outputs


def test_operations_go_to_their_stage(roofline):
    rows = roofline.count(RUNS["swinv2"], 2, CARDS["h100"])
    stages = {row.stage for row in rows}
    assert stages == {"ends", "stage 0", "stage 1", "stage 2", "stage 3"}
    load = workload(RUNS["swinv2"])
    for phase in roofline.PHASES:
        table = load.teacher_products if phase.startswith("teacher") else load.student_products
        for stage in range(4):
            there = sum(
                row.flops for row in rows if row.phase == phase and row.stage == f"stage {stage}"
            )
            here = sum(
                product.backward(2) if phase.endswith("backward") else product.forward(2)
                for product in table
                if product.stage == stage
            )
            assert there == here


def saved(net, batch, size, dtype, keep):
    """Bytes of storages that autograd keeps, but for parameters."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = (storage.nbytes(), storage)  # Kept, so that none is reused.
        return tensor

    images = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(images, keep[:, :batch])
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(
    ("kernels", "dtype", "memory"),
    [
        ("reference", torch.float32, "keep"),
        ("reference", torch.float32, "recompute"),
        ("reference", torch.bfloat16, "recompute"),
        ("triton", torch.bfloat16, "recompute"),
    ],
)
@pytest.mark.parametrize("name", ["swinv2", "vit and clip"])
def test_bytes_kept_as_counted(monkeypatch, name, kernels, dtype, memory):
    from fd_large.backbones.registry import build

    monkeypatch.setenv("FD_KERNELS", kernels)
    run = RUNS[name]
    with torch.device("meta"):
        net = build(
            run.student.model,
            run.student.architecture,
            drop_path_rate=0.1,
            attention_memory=memory,
            residual_dtype="float32",
        ).to(dtype)
    keep = torch.empty(len(net.drop_path_rates), 3, dtype=torch.bool, device="meta")
    size = run.data.image_size
    two, three = (saved(net, batch, size, dtype, keep) for batch in (2, 3))
    planned = traffic.kept(
        run.student_architecture(),
        image_size=size,
        kernels="fused" if kernels == "triton" else kernels,
        bfloat16=dtype == torch.bfloat16,
        float32_stream=True,
        keep_maps=memory == "keep",
        checkpoint_every=0,
    )
    assert planned == pytest.approx(three - two, rel=0.08)


def test_position_tables_are_kept_once_whatever_the_batch(monkeypatch):
    from fd_large.backbones.registry import build

    monkeypatch.setenv("FD_KERNELS", "triton")
    run = RUNS["swinv2"]
    with torch.device("meta"):
        net = build(run.student.model, run.student.architecture).bfloat16()
    keep = torch.empty(len(net.drop_path_rates), 2, dtype=torch.bool, device="meta")
    size = run.data.image_size
    one, two = (saved(net, batch, size, torch.bfloat16, keep) for batch in (1, 2))
    planned = traffic.tables_kept(run.student_architecture(), image_size=size)
    assert planned == pytest.approx(2 * one - two, rel=0.02)


def test_checkpoints_keep_inputs_and_one_block():
    net = registry.get("fd_swinv2g").student_architecture()
    arguments = {
        "image_size": 192,
        "kernels": "fused",
        "bfloat16": True,
        "float32_stream": True,
        "keep_maps": False,
    }
    # The stream in float32, and in the type of the products.
    inputs = (4 + 2) * sum(
        depth * 48**2 / 4**stage * 512 * 2**stage for stage, depth in enumerate((2, 2, 42, 4))
    )
    assert inputs == pytest.approx(99e6, rel=0.01)
    every = traffic.kept(net, checkpoint_every=1, **arguments)
    none = traffic.kept(net, checkpoint_every=0, **arguments)
    assert every - inputs == pytest.approx(38e6, rel=0.02)
    assert none == pytest.approx(528e6, rel=0.02)
    half = traffic.kept(net, checkpoint_every=2, **arguments)
    assert every < half < none
    assert (
        traffic.moved(
            Architecture(family="timm"),
            "inference",
            image_size=224,
            kernels="fused",
            bfloat16=True,
            float32_stream=False,
        )["stream"]
        == 0
    )
