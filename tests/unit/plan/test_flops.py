"""FLOPs by arithmetic against published figures and against the count on the meta device."""

from dataclasses import fields, replace

import pytest

from fd_large.cli.plan import workload
from fd_large.errors import ConfigError
from fd_large.plan import flops
from fd_large.recipes import registry
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve
from fd_large.recipes.family import Transformer


@pytest.mark.parametrize(
    ("size", "window", "gflop"),
    [(192, 12, 743.02), (224, 14, 1015.91), (256, 16, 1333.79), (384, 24, 3083.46)],
)
def test_forward_of_giant(size, window, gflop):
    net = resolve("swinv2_giant", Architecture(window_size=window, extra_norm_every=0))
    assert flops.forward(net, image_size=size) / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("tiny", 7.04), ("small", 13.63), ("base", 23.71), ("large", 52.20), ("huge", 171.98)],
)
def test_forward_of_the_family_at_192(name, gflop):
    net = resolve(f"swinv2_{name}", Architecture(window_size=12))
    assert flops.forward(net, image_size=192) / 1e9 == pytest.approx(gflop, abs=0.01)


def test_position_bias_nets_run_once_a_forward():
    net = resolve("swinv2_tiny")
    one, two, three = (flops.forward(net, batch=n) for n in (1, 2, 3))
    assert three - two == two - one < one


def counted(call):
    """FLOPs that torch counts while `call` runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_registered_net_as_torch_counts_it(name):
    torch = pytest.importorskip("torch")
    from fd_large.backbones.registry import build

    with torch.device("meta"):
        net = build(name)
    a = resolve(name)
    size = getattr(a, "image_size", 224)
    images = torch.empty(3, 3, size, size, device="meta")
    maps = []
    with torch.set_grad_enabled(hasattr(a, "depths")):
        there = counted(lambda: maps.append(net(images).tokens))
    assert flops.forward(a, batch=3) == pytest.approx(there, rel=1e-3)
    if hasattr(a, "depths"):
        backward = counted(lambda: maps[0].sum().backward())
        here = sum(product.backward(3) for product in flops.products(a))
        assert here == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet50"])
def test_listed_nets_of_timm_at_another_size(name):
    torch = pytest.importorskip("torch")
    from fd_large.backbones.timm.timm_backbone import TimmBackbone
    from fd_large.plan.parameters import TIMM

    stride = next(stride for listed, stride in TIMM if listed == name)
    with torch.device("meta"):
        net = TimmBackbone(name, stride=stride)
    counts = TIMM[name, stride]
    assert counts.width == net.width
    assert counts.parameters == sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        there = counted(lambda: net(torch.empty(2, 3, 96, 96, device="meta")))
    a = resolve("timm", Architecture(timm_name=name, feature_stride=stride))
    assert flops.forward(a, image_size=96, batch=2) == there


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ConfigError, match="got convnext_tiny"):
        flops.forward(resolve("timm", Architecture(timm_name="convnext_tiny")))

    class Mixer(Transformer):
        family = "mixer"

    vit = resolve("vit_base_patch16")
    shared = {field.name: getattr(vit, field.name) for field in fields(Transformer)}
    with pytest.raises(ConfigError, match=r"family .*got mixer"):
        flops.forward(Mixer(**shared))


def shrunken(name, *, checkpointing="off", every=1, teacher=None, **student):
    """A recipe with a small student, an odd map, and a teacher of choice."""
    run = registry.get(name)
    return replace(
        run,
        student=replace(
            run.student,
            architecture=Architecture(**student),
            activation_checkpointing=checkpointing,
            checkpoint_every=every,
        ),
        teacher=replace(run.teacher, **(teacher or {"model": run.teacher.model})),
    )


def padded(run):
    """The same on images and windows that do not divide, with one model as both."""
    student = replace(run.student, size_rule="pad")
    data = replace(run.data, image_size=170)
    objective = replace(run.objective, teacher_image_size=192, interpolation="bilinear")
    return replace(run, student=student, data=data, objective=objective)


SWIN = {"embed_dim": 32, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": 6}
VIT = {"embed_dim": 64, "depths": (3,), "num_heads": (2,)}
STEPS = {
    "swinv2": shrunken("fd_swinv2_base", **SWIN),
    "swinv2, one position bias a stage": shrunken(
        "fd_swinv2_base", checkpointing="every", shared_position_bias=True, **SWIN
    ),
    "swinv2, checkpointed": shrunken("fd_swinv2g", checkpointing="every", **SWIN),
    "swinv2, padded": padded(shrunken("fd_swinv2_base", **(SWIN | {"window_size": 7}))),
    "vit, prefix matched": shrunken("fd_clip_vit_base", **VIT),
    "vit, checkpointed": shrunken("fd_clip_vit_base", checkpointing="every", **VIT),
    "vit, prefix dropped": shrunken(
        "fd_clip_vit_base", teacher={"model": "efficientnet_lite0"}, **VIT
    ),
    "quickstart": registry.get("quickstart"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_as_torch_counts_it(name):
    torch = pytest.importorskip("torch")
    from fd_large.engine.block_wrappers import checkpoint_blocks
    from fd_large.tasks.distillation.job import DistillationJob

    run = STEPS[name]
    recompute = run.student.activation_checkpointing == "every" or "prefix" in name
    if recompute:
        run = replace(run, student=replace(run.student, attention_memory="recompute"))
    if name == "vit, prefix dropped":
        objective = replace(run.objective, interpolation="bilinear")
        run = replace(run, objective=objective)
    with torch.device("meta"):
        teacher = DistillationJob(run).make_teacher()
        task = DistillationJob(run).task_around(teacher)
    checkpoint_blocks(
        task.student.blocks(),
        mode=run.student.activation_checkpointing,
        every=run.student.checkpoint_every,
    )
    size = run.data.image_size
    images = torch.empty(2, 3, size, size, dtype=torch.uint8, device="meta")
    keep = torch.empty(len(task.drop_path_rates), 2, dtype=torch.bool, device="meta")
    step = workload(run).step_flops(
        micro_batch_size=2,
        checkpointing=run.student.activation_checkpointing != "off",
        attention_recomputed=recompute,
    )
    prepared = {}
    assert counted(lambda: prepared.update(task.prepare(images, None, keep))) == pytest.approx(
        step.teacher_forward, rel=1e-3
    )
    losses = []
    assert counted(lambda: losses.append(task(**prepared)[0])) == pytest.approx(
        step.student_forward, rel=1e-3
    )
    backward = counted(lambda: losses[0].backward())
    assert backward == pytest.approx(step.student_backward + step.recomputation, rel=1e-3)
    assert step.hardware == step.model + step.recomputation
