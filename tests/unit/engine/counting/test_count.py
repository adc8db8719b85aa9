"""A step is counted on the real task: by hand, against torch's counter, and published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from page_examples import EXAMPLES
from tiny_timm import tiny
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.counting.count import count, record, step_flops
from fd_large.engine.counting.recorder import Recorder
from fd_large.engine.counting.step import models_of, on_shapes
from fd_large.errors import ConfigError
from fd_large.kernels.choose import Device, standing_in
from fd_large.plan.counts import Counts, Line
from fd_large.recipes import registry
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve
from fd_large.recipes.sections import Student
from fd_large.tasks.jobs import job_of

H100, L40S, CPU = Device((9, 0)), Device((8, 9)), Device(None, on_gpu=False)
DEVICES = {"fused": H100, "reference": L40S, "cpu": CPU}


def counted(run, device, *, bfloat16=True, **options):
    return count(job_of(run), device, bfloat16=bfloat16, frozen_bfloat16=bfloat16, **options)


def test_a_linear_layer_by_hand():
    layer = nn.Linear(32, 48, device="meta")
    x = torch.empty(16, 32, device="meta", requires_grad=True)
    recorder = Recorder([layer])
    with recorder:
        y = layer(x).relu()
        recorder.phase = "backward"
        y.backward(torch.empty_like(y))
    found = {(o.phase, o.name): o for o in recorder.operations}
    product, weight, inputs, outputs = 2 * 16 * 32 * 48, 4 * 32 * 48, 4 * 16 * 32, 4 * 16 * 48
    forward = found["forward", "addmm"]
    assert forward.flops == product
    assert (forward.read, forward.written) == (weight + 4 * 48 + inputs, outputs)
    backward = [o for o in recorder.operations if o.name == "mm"]
    assert [o.flops for o in backward] == [product, product]
    assert sum(o.read + o.written for o in backward) == 2 * (weight + inputs + outputs)
    bias = found["backward", "sum"]
    assert bias.read + bias.written == outputs + 4 * 48
    relu = found["forward", "relu"]
    assert relu.read + relu.written == 2 * outputs


def test_a_convolution_in_groups_counts_its_own_channels():
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False, device="meta")
    recorder = Recorder([layer])
    with recorder:
        y = layer(torch.empty(2, 8, 5, 5, device="meta", requires_grad=True))
        recorder.phase = "backward"
        y.sum().backward()
    forward, backward = (o.flops for o in recorder.operations if o.flops)
    assert forward == 2 * y.numel() * 2 * 9
    assert backward == 2 * forward


def test_a_kernel_that_is_registered_after_the_recorder_brings_its_flops(monkeypatch):
    op = torch.ops.aten.erfinv
    monkeypatch.setitem(flop_registry, op, lambda x, *, out_val: 7 * x.numel())
    with Recorder() as recorder:
        torch.empty(3, device="meta").erfinv()
    assert [o.flops for o in recorder.operations] == [21]


@pytest.mark.parametrize(
    ("size", "window", "gflop"),
    [
        (192, 12, 743.02),
        pytest.param(224, 14, 1015.91, marks=pytest.mark.sweep),
        pytest.param(256, 16, 1333.79, marks=pytest.mark.sweep),
        (384, 24, 3083.46),
    ],
)
def test_published_flops_of_giant(size, window, gflop):
    model = Architecture(window_size=window, extra_norm_every=0)
    assert forward_flops("swinv2_giant", model, size) / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [
        ("tiny", 7.04),
        pytest.param("small", 13.63, marks=pytest.mark.sweep),
        pytest.param("base", 23.71, marks=pytest.mark.sweep),
        pytest.param("large", 52.20, marks=pytest.mark.sweep),
        ("huge", 171.98),
    ],
)
def test_published_flops_of_the_family_at_192(name, gflop):
    model = Architecture(window_size=12)
    assert forward_flops(f"swinv2_{name}", model, 192) / 1e9 == pytest.approx(gflop, abs=0.01)


def forward_flops(name, model, size):
    with standing_in(H100), torch.device("meta"):
        net = build(resolve(name, model)).to(torch.bfloat16)
        recorder = Recorder([net])
        with recorder, torch.no_grad():
            net(torch.empty(1, 3, size, size, dtype=torch.bfloat16))
    return sum(o.flops for o in recorder.operations)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.family != "timm"])
def test_fused_kernels_compute_what_torch_counts_on_the_reference(name):
    found = {}
    # Blocks of a stage are alike but for every second one, which is shifted.
    depths = tuple(min(depth, 2) for depth in resolve(name).depths)
    model = resolve(name, Architecture(depths=depths))
    for device in (H100, CPU):
        with standing_in(device), torch.device("meta"):
            net = build(model, attention_memory="keep").to(torch.bfloat16)
            images = torch.empty(2, 3, model.image_size, model.image_size, dtype=torch.bfloat16)
            with FlopCounterMode(display=False) as mode:
                net(images).tokens.sum()
        found[device] = mode.get_total_flops()
    assert found[H100] == found[CPU] > 0


def small(name, **model):
    run = registry.get(name)
    student, teacher = (
        replace(part, architecture=replace(part.architecture, **model))
        for part in (run.student, run.teacher)
    )
    return replace(run, student=student, teacher=teacher)


SWIN = {"embed_dim": 32, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 6}
SMALL = {
    "swinv2": small("fd_swinv2_base", **SWIN),
    "vit": small("fd_clip_vit_base", embed_dim=64, depths=(3,), num_heads=(2,)),
    "swinv2 and swin": small("fd_esvit_swin_base", **(SWIN | {"window_size": 7})),
    "quickstart": registry.get("quickstart"),
    "timm": replace(
        registry.get("quickstart"),
        student=Student(model=f"timm:{tiny('convnextv2_atto')}"),
        objective=replace(registry.get("quickstart").objective, interpolation="bilinear"),
    ),
}


@pytest.mark.parametrize(
    ("name", "device"),
    [
        # A model of timm runs nothing of ours that a card decides.
        pytest.param(
            *(name, DEVICES[device]),
            id=f"{name}-{device}",
            marks=pytest.mark.sweep if (name, device) == ("timm", "reference") else (),
        )
        for name in SMALL
        for device in DEVICES
    ],
)
def test_two_counts_give_every_batch(name, device):
    run, bfloat16 = SMALL[name], device.on_gpu
    found = counted(run, device, bfloat16=bfloat16)
    with on_shapes(device):
        job = job_of(run)
        models = models_of(job, bfloat16=bfloat16, frozen_bfloat16=bfloat16)
        with torch.no_grad():  # A frozen model keeps its tables from then on.
            models.task.shapes_only(job.probe_batch(2))
    held = [sum(p.numel() for p in model.parameters()) for model in models.frozen.values()]
    trained = sum(p.numel() for p in models.task.parameters() if p.requires_grad)
    for wrapped, counts in found.items():
        assert counts.images == 0
        assert sum(size * times for size, times in counts.student) == trained
        assert [sum(size * times for size, times in one) for one in counts.frozen] == held
        if wrapped:
            models.checkpoint(run.student.checkpoint_every)
        for batch in (8, 32):
            with on_shapes(device):
                alone = record(models, job.probe_batch(batch))
            operations = alone.operations
            flops = sum(o.flops for o in operations)
            assert counts.step_flops(batch).hardware == flops
            beside = sum(o.read + o.written for o in operations if not o.flops)
            assert sum(line.at(batch) for line in counts.moved.values()) == beside
            within = sum(o.read + o.written for o in operations if o.flops)
            assert sum(p.times * p.moved.at(batch) for p in counts.products) == within
            assert counts.calls == alone.calls
            assert counts.kept.at(batch) == alone.kept
            assert counts.peak_at(batch) == max(alone.trail)


@pytest.mark.parametrize(
    ("name", "blocks", "modules"),
    [
        # Embedding, norms and projections of model and task; position MLPs are called by a stage.
        ("swinv2", {"inference": 5, "forward": 10}, {"inference": 19, "forward": 20}),
        ("vit", {"inference": 3, "forward": 3}, {"inference": 6, "forward": 7}),
        ("timm", {}, None),
    ],
)
def test_modules_within_blocks_that_are_gathered_whole_are_not_counted(name, blocks, modules):
    found = counted(SMALL[name], H100)
    assert found[False].blocks == found[True].blocks == blocks
    assert modules in (None, found[False].modules)
    # Only what has hooks of its own runs them again.
    assert ("backward" in found[True].modules) == (modules is None)


@pytest.mark.parametrize("name", ["swinv2", "vit"])
def test_what_is_computed_again_is_no_part_of_the_model(name):
    run = SMALL[name]
    kept, reference, fused = (
        counted(run, device, bfloat16=device.on_gpu) for device in (CPU, L40S, H100)
    )
    plain = kept[False].step_flops(4)
    assert plain.model == plain.hardware, "maps are kept, and nothing is computed again"
    forward = kept[False].flops("forward", 4)
    for counts in (kept, reference, fused):
        for wrapped, each in counts.items():
            assert each.step_flops(4).model == pytest.approx(plain.model, rel=1e-9)
            if wrapped:
                again = each.step_flops(4).hardware - counts[False].step_flops(4).hardware
                assert again == pytest.approx(forward, rel=0.2)
    logits = fused[False].step_flops(4).hardware - plain.model
    assert 0 < logits < 0.2 * forward


def test_the_planned_card_decides_the_kernels():
    fused, reference = (
        counted(SMALL["vit"], d, checkpointing=[False])[False] for d in (H100, L40S)
    )
    assert reference.moved["forward"].each > 2 * fused.moved["forward"].each
    asked = Device((9, 0), wish="reference")
    assert counted(SMALL["vit"], asked, checkpointing=[False])[False] == reference


# Students that the package did not write, and the images with which their peak is measured.
STUDENTS = {
    # So many images that what oneDNN takes for itself, whatever their number, does not show.
    "timm:convnextv2_atto": 24,
    "timm:vit_tiny_patch16_224": 2,
    f"timm:{tiny('swin_tiny_patch4_window7_224')}": 2,
    f"timm:{tiny('eva02_tiny_patch14_224')}": 2,
    "module:convnet.py:ConvNet": 24,
}
PEAKS = {name: 4 for name in SMALL if name != "timm"} | STUDENTS


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Makes the run of a name in SMALL or of one of the STUDENTS."""
    (tmp_path / "convnet.py").write_text(EXAMPLES["convnet.py"])
    doors.allow(tmp_path / "convnet.py")
    monkeypatch.chdir(tmp_path)

    def make(name):
        if name in SMALL:
            return SMALL[name]
        run = SMALL["timm"]
        if name.startswith("module:"):  # Beside a teacher whose maps are smaller than its own.
            run = replace(run, teacher=SMALL["vit"].teacher)
        if not name.endswith("atto"):
            run = replace(run, data=replace(run.data, image_size=224))
        return replace(run, student=Student(model=doors.absolute(name)))

    return make


@pytest.mark.parametrize("device", [H100, CPU], ids=["card", "cpu"])
@pytest.mark.parametrize("name", STUDENTS)
def test_parameters_and_flops_are_those_of_the_plain_model(name, device, run_of):
    run, images = run_of(name), 2
    counts = counted(run, device, bfloat16=device.on_gpu, checkpointing=[False])[False]
    kind, _, rest = name.partition(":")
    with torch.device("meta"), FlopCounterMode(display=False) as mode:
        if kind == "timm":
            plain = timm.create_model(rest, num_classes=0)
        else:
            plain = doors.load(run.student.model, kind="backbones", where="student.model")()
        stem = next(m for m in plain.modules() if isinstance(m, nn.Conv2d))
        maps = []
        stem.register_forward_hook(lambda *given: maps.append(given[-1]))
        plain(torch.empty(images, 3, run.data.image_size, run.data.image_size))
        task, _ = job_of(run).models_on_shapes()
    # A norm of the head comes after the map that is learnt.
    kept = {k: p for k, p in plain.named_parameters() if not k.startswith(("head.", "fc_norm."))}
    width, teacher_width = task.student.width, task.projection.out_features
    trained = sum(p.numel() for p in kept.values()) + (width + 1) * teacher_width
    assert sum(size * times for size, times in counts.student) == trained
    rows, columns = task.student.grid(run.data.image_size, run.data.image_size)
    forward = mode.get_total_flops() + 2 * images * rows * columns * width * teacher_width
    assert counts.flops("forward", images) == forward
    # Nobody asks for the gradient of the images.
    of_images = 2 * maps[0].numel() * stem.weight[0].numel()
    assert counts.flops("backward", images) == 2 * forward - of_images


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_the_allocators(name, run_of):
    run, images = run_of(name), PEAKS[name]
    # In the checkpointed convnextv2_atto oneDNN's share shows, 17 of 142 MB; it is not compared.
    modes = (False,) if name == "timm:convnextv2_atto" else (False, True)
    found = counted(run, CPU, bfloat16=False, checkpointing=modes)
    job = job_of(run)
    task, _ = job.models_on_shapes()
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = job.probe_batch(images)
    with torch.no_grad():  # A frozen model keeps its tables from then on.
        task.shapes_only(batch)
    for wrapped, counts in found.items():
        if wrapped:
            checkpoint_blocks(task.student.blocks(), mode="every")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            task.shapes_only(batch).backward()
        live, most = batch.images.nbytes, 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        assert counts.peak_at(images) == pytest.approx(most, rel=0.05), wrapped


def test_sequential_attention_is_counted_at_the_asked_batch():
    run = registry.get("coco_mask_rcnn_swinv2_tiny")
    detection = replace(run.task.detection, sequential_stages=2)
    run = replace(run, task=replace(run.task, detection=detection))
    counts = counted(run, L40S, checkpointing=[False], micro_batch_size=1)[False]
    assert counts.images == 1
    assert counts.kept.each == 0 < counts.kept.at(1)


def test_code_that_needs_values_leaves_a_run_without_flops_and_ends_a_plan(tmp_path):
    path = tmp_path / "loss.py"
    path.write_text("def loss(p, t):\n    p.detach().numpy()\n    return (p - t).square().mean()\n")
    doors.allow(path)
    run = registry.get("quickstart")
    run = replace(run, objective=replace(run.objective, loss=f"module:{path}:loss"))
    assert step_flops(job_of(run), 2, checkpointing=False) is None
    with pytest.raises(ConfigError, match="numpy"):
        counted(run, H100)


@pytest.mark.parametrize(
    "run",
    [
        SMALL["timm"],
        registry.get("coco_mask_rcnn_vit_base"),
        registry.get("finetune_clip_vit_base"),
    ],
    ids=["timm", "detection", "fine-tuning"],
)
def test_the_meter_gets_flops_of_every_task(run):
    before = torch.get_rng_state()
    plain, wrapped = (step_flops(job_of(run), 2, checkpointing=c) for c in (False, True))
    assert torch.equal(torch.get_rng_state(), before)
    assert plain.model == wrapped.model > 0
    assert wrapped.hardware > plain.hardware >= plain.model


def test_counts_survive_json():
    import json

    counts = counted(SMALL["vit"], H100)[True]
    assert Counts.from_plain(json.loads(json.dumps(counts.to_plain()))) == counts
    assert counts.moved["forward"] == Line(*counts.moved["forward"])
