"""The segmentation whole: losses, gradients, what is frozen, counted and left out."""

from __future__ import annotations

import pytest
import torch
from segmentation_batches import NUM_CLASSES, batch_of, narrow_run
from torch.utils.flop_counter import FlopCounterMode

from fd_large.engine.counting.count import step_flops
from fd_large.recipes import registry
from fd_large.tasks.segmentation.job import SegmentationJob
from fd_large.tasks.segmentation.task import Segmentation

RECIPES = [name for name in registry.RECIPES if name.startswith("ade20k_")]
SWIN, VIT = "ade20k_upernet_swinv2_giant", "ade20k_upernet_vit_base"
# Parameters of UPerNet, the second head, and a ViT's maps, counted on mmsegmentation's own.
PUBLISHED = {
    "ade20k_upernet_vit_base": (67_963_542, 1_808_534, 7_081_728),
    "ade20k_upernet_vit_large": (120_764_566, 2_398_358, 12_588_032),
    "ade20k_upernet_swinv2_base": (33_315_990, 1_218_710, None),
    "ade20k_upernet_swinv2_giant": (55_139_478, 4_757_654, None),
}


def segmentation(name: str = SWIN, **own: object) -> Segmentation:
    torch.manual_seed(0)
    return SegmentationJob(narrow_run(name, **own)).make_task()


def loss_of(task: Segmentation, batch, keep=None):
    return task(**task.prepare(batch.images, batch.targets, keep))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_twin_trains_and_names_classes(name):
    task = segmentation(name)
    batch = batch_of([0, 1])
    keep = torch.ones(len(task.drop_path_rates), 2, dtype=torch.bool)
    loss, terms = loss_of(task, batch, keep)
    loss.backward()
    assert loss.dtype == torch.float32
    assert sum(terms.values()).item() == pytest.approx(loss.item(), rel=1e-6)
    missing = {name for name, p in task.named_parameters() if p.grad is None}
    frozen = {name for name, _ in task.named_parameters() if name.startswith("student.")}
    assert missing == (frozen if task.frozen else set())
    assert {task.layer_scale(name, 0.5) for name in missing} <= {0.0}
    # Smaller images, of odd sizes, are taken too.
    logits = task.eval().predict(batch.images[..., :53, :47])
    assert logits.shape == (2, NUM_CLASSES, 53, 47)


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(over):
    task = segmentation(loss_over=over)
    loss, _ = loss_of(task, batch_of([0, 1], ignored=True))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in task.parameters())


def test_what_a_loss_is_divided_by():
    batch = batch_of([0, 1])
    share = (batch.targets.truth >= 0).float().mean().item()
    (of_all, _), (of_labelled, _) = (
        loss_of(segmentation(loss_over=over), batch) for over in ("all", "labelled")
    )
    assert of_all.item() == pytest.approx(share * of_labelled.item(), rel=1e-5)


def test_statistics_move_with_a_step_that_is_taken_and_with_no_other():
    task = segmentation()
    before = {name: b.clone() for name, b in task.named_buffers()}
    loss_of(task, batch_of([0, 1]))[0].backward()
    task.before_step(0)
    task.after_step()
    assert all(torch.equal(b, before[name]) for name, b in task.named_buffers())
    loss_of(task, batch_of([0, 1]))[0].backward()
    task.after_step()
    moved = [name for name, b in task.named_buffers() if not torch.equal(b, before[name])]
    assert moved == [name for name in before if "running" in name]


def test_dropped_channels_follow_the_position():
    task, batch = segmentation(VIT), batch_of([0, 1, 2, 3])
    channels = task.prepare(batch.images, batch.targets, None)["channels"]
    half = batch.targets._replace(
        positions=batch.targets.positions[2:], sizes=batch.targets.sizes[2:]
    )
    assert torch.equal(task.prepare(batch.images[2:], half, None)["channels"], channels[2:])
    assert 0.02 < 1 - channels.float().mean().item() < 0.25


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        task = SegmentationJob(registry.get(name)).make_task()
    of_head, of_auxiliary, of_neck = PUBLISHED[name]
    count = {
        part: sum(p.numel() for p in getattr(task, part).parameters())
        for part in ("head", "auxiliary", "neck")
    }
    assert (count["head"], count["auxiliary"]) == (of_head, of_auxiliary)
    assert of_neck is None or count["neck"] == of_neck


@pytest.mark.parametrize("name", [SWIN, VIT, "ade20k_linear"])
def test_a_step_is_counted_on_shapes_as_torch_counts_it(name):
    counted = step_flops(SegmentationJob(narrow_run(name)), 2, checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        loss_of(segmentation(name), batch_of([0, 1]))[0].backward()
    assert counted is not None
    assert counted.model == counter.get_total_flops()


def test_a_vit_decays_its_positions_and_a_swin_keeps_its_exemptions():
    vit = segmentation(VIT)
    assert vit.no_weight_decay() == (frozenset(), ())
    swin = segmentation(SWIN)
    assert swin.no_weight_decay()[1] == tuple(swin.student.no_weight_decay_keywords())
