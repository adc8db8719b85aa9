"""The detector whole: what it reads of its inputs, what its parameters are called, its cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detection_batches import NUM_CLASSES, batch_of, narrow_run, part_of
from torch.utils.flop_counter import FlopCounterMode

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.engine.zero.optimizer import parameter_groups
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Student
from fd_large.tasks.detection.heads.roi_heads import RoIHeads
from fd_large.tasks.detection.job import DetectionJob
from fd_large.tasks.detection.task import HEADS, Detection, combine

RECIPES = [name for name in registry.RECIPES if name.startswith(("coco_", "o365_"))]
SWIN, VIT = "coco_mask_rcnn_swinv2_giant", "coco_mask_rcnn_vit_base"
TERMS = {"rpn_cls", "rpn_box", "cls", "box", "mask"}


def detector(name: str = SWIN, **changes: object) -> Detection:
    torch.manual_seed(0)
    return DetectionJob(narrow_run(name, **changes)).make_task()


def loss_of(task: Detection, batch, keep=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return task(**task.prepare(batch.images, batch.targets, keep))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_twin_trains_and_detects_at_odd_sizes(name):
    task = detector(name)
    batch = batch_of(0, (83, 67), [3, 0])
    keep = torch.ones(len(task.drop_path_rates), 2, dtype=torch.bool)
    loss, terms = loss_of(task, batch, keep)
    loss.backward()
    if "mask_rcnn" in name:
        assert set(terms) == TERMS
    assert loss.dtype == torch.float32
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-5)
    assert not any(term.requires_grad for term in terms.values())
    missing = [name for name, p in task.named_parameters() if p.grad is None]
    assert missing == []
    task.eval()
    for seen, size in zip(task.see(batch.images, batch.targets.sizes), (83, 73), strict=True):
        assert len(seen.boxes) == len(seen.scores) == len(seen.labels) == len(seen.masks)
        assert seen.boxes[:, 3].max() <= size
        assert seen.labels.max() < NUM_CLASSES
        assert (seen.scores.diff() <= 0).all()


OWN = """
import torch.nn.functional as F
from torch import nn
from fd_large.backbones.feature_map import FeatureMap

class Stages(nn.Module):
    width, num_prefix_tokens = 64, 0
    stage_widths, stage_strides = (8, 16, 32, 64), (4, 8, 16, 32)
    drop_path_rates = ()

    def __init__(self):
        super().__init__()
        widths = zip((3, *self.stage_widths), self.stage_widths, (4, 2, 2, 2))
        self.down = nn.ModuleList(nn.Conv2d(a, b, k, k) for a, b, k in widths)

    def blocks(self):
        return list(self.down)

    def grid(self, height, width):
        return height // 32, width // 32

    def stages(self, images, keep=None):
        x = F.pad(images, (0, -images.shape[-1] % 32, 0, -images.shape[-2] % 32))
        return tuple((x := down(x)).permute(0, 2, 3, 1) for down in self.down)

    def forward(self, images, keep=None):
        last = self.stages(images)[-1]
        return FeatureMap(last.flatten(1, 2), tuple(last.shape[1:3]), 0)
"""


def test_a_student_of_the_users_own_carries_the_pyramid(tmp_path):
    (tmp_path / "stages.py").write_text(OWN)
    doors.allow(tmp_path / "stages.py")
    run = narrow_run(SWIN)
    own = Student(model=f"module:{tmp_path}/stages.py:Stages")
    detection = replace(run.task.detection, sequential_stages=0)
    run = replace(run, student=own, task=replace(run.task, detection=detection))
    task = DetectionJob(run).make_task()
    loss, terms = loss_of(task, batch_of(0, (83, 67), [3, 0]))
    loss.backward()
    assert set(terms) == TERMS
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_whole(name):
    run = registry.get(name)
    with torch.device("meta"):
        task = DetectionJob(run).make_task()
    assert len(task.student.blocks()) == sum(run.student_architecture().depths)
    # Pyramid and heads: ViTDet's are 21 to 27 million, with a cascade 55 to 60.
    apart = ("student.", "attention.")
    heads = sum(p.numel() for n, p in task.named_parameters() if not n.startswith(apart))
    least, most = (20e6, 35e6) if "mask_rcnn" in name else (50e6, 70e6)
    assert least < heads < most


@pytest.mark.parametrize("name", ["coco_mask_rcnn_swinv2_tiny", VIT])
def test_a_recipe_can_be_counted_at_its_own_size(name):
    run = registry.get(name)
    depths = run.student_architecture().depths
    # One block a stage, or as many as a ViT's pyramid takes, is counted as all are.
    shallow = (1,) * len(depths) if len(depths) > 1 else (4,)
    architecture = replace(run.student.architecture, depths=shallow)
    run = replace(run, student=replace(run.student, architecture=architecture))
    with torch.device("meta"):
        task = DetectionJob(run).make_task()
    with FlopCounterMode(display=False) as flops:
        task.shapes_only(DetectionJob(run).probe_batch(1).to("meta")).backward()
    assert flops.get_total_flops() > 0.9e12


@pytest.mark.parametrize("name", [SWIN, VIT])
def test_shapes_only_on_the_meta_device_costs_what_a_full_step_costs(name):
    task, batch = detector(name), batch_of(7, (96, 80), [8, 9])
    sizes = []
    for head in (task.heads.box, task.heads.mask):
        head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with FlopCounterMode(display=False) as real:
        loss_of(task, batch, task.keep_all(batch.images))[0].backward()
    assert sizes == [2 * 16, 2 * 4]  # The recipe's limit of rois, and a quarter of it.
    with torch.device("meta"):
        task = detector(name)
    with FlopCounterMode(display=False) as counted:
        task.shapes_only(batch.to("meta")).backward()
    assert counted.get_total_flops() == real.get_total_flops()


def test_heads_are_chosen_by_name(monkeypatch):
    class Others(RoIHeads):
        pass

    monkeypatch.setitem(HEADS, "others", Others)
    run = narrow_run(SWIN)
    for name, expected in (("mask_rcnn", RoIHeads), ("others", Others)):
        numbers = replace(run.task.detection, heads=name)
        other = replace(run, task=replace(run.task, detection=numbers))
        assert type(DetectionJob(other).make_task().heads) is expected
    numbers = replace(run.task.detection, heads="detr")
    with pytest.raises(ConfigError, match=r"task\.detection\.heads.*'detr'.*mask_rcnn"):
        DetectionJob(replace(run, task=replace(run.task, detection=numbers))).make_task()


def test_the_loss_is_a_function_of_seed_epoch_and_position():
    task, batch = detector(), batch_of(0, (64, 64), [5, 2])
    # So few are looked at that another draw is another loss.
    task.anchors_per_image = task.heads.rois_per_image = 4

    def loss(**changed) -> float:
        return loss_of(task, replace(batch, targets=batch.targets._replace(**changed)))[0].item()

    first = loss()
    assert loss() == first
    assert loss(epoch=1) != first
    assert loss(positions=batch.targets.positions + 1) != first
    task.seed = 1
    assert loss() != first


def test_an_image_s_samples_do_not_depend_on_its_batch():
    task, batch = detector(), batch_of(0, (64, 64), [5, 2, 0, 9])
    # All images have as many sampled anchors, so that the mean of the batch is the mean of means.
    alone = [loss_of(task, part_of(batch, i, i + 1))[1]["rpn_cls"].item() for i in range(4)]
    _, terms = loss_of(task, batch)
    assert terms["rpn_cls"].item() == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_a_rank_s_loss_is_over_what_all_ranks_looked_at(monkeypatch):
    terms = {"rpn_cls": (6.0, 10), "rpn_box": (3.0, 10), "cls": (8.0, 0), "mask": (0.0, 0)}
    others = torch.tensor([20.0, 20.0, 8.0, 0.0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_tensor", lambda own: own + others)
    loss, means = combine({n: (torch.tensor(total), count) for n, (total, count) in terms.items()})
    # Twice the share: the mean over two ranks is then the sum over both through all counts.
    assert {name: value.item() for name, value in means.items()} == pytest.approx(
        {"rpn_cls": 0.4, "rpn_box": 0.2, "cls": 2.0, "mask": 0.0}
    )
    assert loss.item() == pytest.approx(2.6)


def test_what_is_beyond_an_image_s_size_is_not_seen():
    task, batch = detector(), batch_of(0, (64, 64), [2, 2])
    other = batch.images.clone()
    height, width = batch.targets.sizes[1].tolist()
    other[1, :, height:] = 255
    other[1, :, :, width:] = 7
    assert not torch.equal(other, batch.images)
    assert torch.equal(
        task.pixels(other, batch.targets.sizes), task.pixels(batch.images, batch.targets.sizes)
    )
    mean = torch.tensor([0.485, 0.456, 0.406]) * 255
    image = mean.round().byte().view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert task.pixels(image, torch.tensor([[4, 4]])).abs().max() < 0.02


@pytest.mark.parametrize("name", [SWIN, VIT])
def test_padding_does_not_blow_up_the_gradients_of_a_net_with_zero_biases(name):
    norms = []
    for side in (128, 32):
        task = detector(name)
        batch = batch_of(0, (128, 128), [3, 2])
        sizes = torch.full((2, 2), side)
        loss_of(task, replace(batch, targets=batch.targets._replace(sizes=sizes)))[0].backward()
        norms.append(torch.stack([p.grad.norm() for p in task.parameters()]).norm().item())
    # Zeros in place of grey: 1e16 and 500.
    assert norms[1] < 3 * norms[0]


def test_the_student_s_parameters_keep_their_names():
    for name in (SWIN, VIT):
        run = narrow_run(name)
        plain = build(run.student.model, run.student.architecture)
        there = {n for n, _ in detector(name).student.named_parameters()}
        assert {n for n, _ in plain.named_parameters()} - there == (
            {"norm.weight", "norm.bias"} | ({"cls_token"} if name == VIT else set())
        )
        assert there <= {n for n, _ in plain.named_parameters()}


def test_learning_rates_fall_with_depth_and_norms_and_position_nets_are_not_decayed():
    task = detector()
    for name, scale in (
        ("heads.box.whole.weight", 1.0),
        ("pyramid.norm0.weight", 1.0),
        ("student.patch_embed.proj.weight", 0.5**6),
        ("student.layers.3.blocks.0.norm1.weight", 0.5),
    ):
        assert task.layer_scale(name, 0.5) == scale
    names = {id(p): name for name, p in task.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(task, 0.05)
    )
    assert {"rpn.objectness.weight", "heads.mask.doubling.weight"} <= decayed
    assert {"pyramid.norm0.weight", "student.layers.0.blocks.0.attn.cpb_mlp.0.weight"} <= free


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (SWIN, {}),
        (SWIN, {"window_size": 6, "pretrained_window_sizes": (4, 4, 4, 2)}),
        (VIT, {}),
    ],
)
def test_a_distilled_student_is_loaded_as_it_is_for_any_window(name, shape, tmp_path):
    path, run = tmp_path / "student.pth", narrow_run(name)
    net = build(run.student.model, run.student.architecture, seed=5)
    state = {name: p.detach() + 0.01 for name, p in net.named_parameters()}
    torch.save(state, path)
    architecture = replace(run.student.architecture, **shape)
    job = DetectionJob(
        replace(run, student=replace(run.student, init=str(path), architecture=architecture))
    )
    task = job.make_task()
    load_weights(task.student, job.initial_weights()["student"], where="--student.init")
    for key, parameter in task.student.named_parameters():
        assert torch.equal(parameter, state[key]), key
    if shape:
        assert [stage.pretrained_window for stage in task.student.layers] == [4, 4, 4, 2]
        assert torch.isfinite(loss_of(task, batch_of(0, (100, 70), [2, 0]))[0])
    torch.save({n: t for n, t in state.items() if not n.endswith("mlp.fc1.bias")}, path)
    with pytest.raises(WeightsError, match=r"mlp\.fc1\.bias"):
        DetectionJob(job.run).initial_weights()


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("box_loss", dict(box_loss="giou")),
        ("semantic_classes", dict(heads="cascade", semantic_classes=183)),
        ("cascade_form", dict(heads="htc", cascade_form="detectron2")),
        (
            "class_agnostic",
            dict(heads="cascade", cascade_form="detectron2", class_agnostic=False),
        ),
    ],
)
def test_settings_that_do_not_fit_the_heads_are_refused(field, settings):
    with pytest.raises(ConfigError, match=rf"^task\.detection\.{field}: "):
        replace(registry.get(VIT).task.detection, **settings)


def test_settings_that_do_not_fit_the_student_are_refused():
    run = narrow_run(VIT)
    for field, value in (("sequential_stages", 1), ("extra_attention", True)):
        numbers = replace(run.task.detection, **{field: value})
        with pytest.raises(ConfigError, match=field):
            DetectionJob(replace(run, task=replace(run.task, detection=numbers))).make_task()
    run = narrow_run(SWIN)
    with pytest.raises(ConfigError, match="'pad'"):
        DetectionJob(replace(run, student=replace(run.student, size_rule="drop"))).make_task()
    three = Architecture(embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=4)
    with pytest.raises(ConfigError, match="4 stages"):
        DetectionJob(replace(run, student=replace(run.student, architecture=three))).make_task()


def test_it_learns_a_picture():
    task = detector()
    batch = batch_of(5, (64, 64), [2, 1])
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss, _ = loss_of(task, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_heads_of_the_users_own_stand_in_for_ours(tmp_path):
    path = tmp_path / "heads.py"
    path.write_text(
        "from fd_large.tasks.detection.heads.roi_heads import RoIHeads\n"
        "class Own(RoIHeads):\n    pass\n"
    )
    doors.allow(path)
    run = narrow_run(VIT)
    own = replace(run.task.detection, heads=f"module:{path}:Own")
    task = DetectionJob(replace(run, task=replace(run.task, detection=own))).make_task()
    assert type(task.heads).__name__ == "Own"
    loss_of(task, batch_of(0, (64, 64), [2]))[0].backward()
