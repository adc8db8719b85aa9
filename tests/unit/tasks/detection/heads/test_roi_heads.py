"""What all heads have in common: one graph on all ranks, detections; and Mask R-CNN's losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detection_batches import NO_BOXES, batch_of, boxes
from detection_heads import HEADS, ROIS, SIZES, STRIDES, heads_and_maps, terms_of

from fd_large.tasks.dense.convolution import Doubling
from fd_large.tasks.detection.heads.box_head import BoxHead
from fd_large.tasks.detection.heads.mask_head import cut_masks
from fd_large.tasks.detection.heads.pooling import pool

EVERY_KIND = pytest.mark.parametrize("kind", HEADS)


def watched(heads) -> tuple[list[str], list[int]]:
    """What runs from now on, in its order, and how many rois box and mask heads get."""
    calls: list[str] = []
    sizes: list[int] = []
    for name, module in heads.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        if isinstance(module, BoxHead | Doubling):
            module.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return calls, sizes


def test_losses_of_mask_rcnn_equal_the_definition():
    heads, maps = heads_and_maps("mask_rcnn")
    targets = batch_of(4, (64, 64), [2, 1]).targets.targets
    # Only the objects themselves are candidates: all are for an object, four an image at most.
    sums, counts = terms_of(heads, maps, [NO_BOXES, NO_BOXES], targets)
    assert counts == {"cls": 3, "box": 3, "mask": 3}
    rois = [target.boxes for target in targets]
    logits, deltas = heads.box(pool(maps, STRIDES, rois, 7))
    labels = torch.cat([target.labels for target in targets])
    assert sums["cls"].item() == pytest.approx(
        F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5
    )
    # A proposal that is the object asks for no change.
    own = deltas[torch.arange(3), labels]
    assert sums["box"].item() == pytest.approx(own.abs().sum().item(), rel=1e-4)
    masks = heads.mask(pool(maps, STRIDES, rois, 14))[torch.arange(3), labels]
    drawn = torch.cat(
        [cut_masks(t.masks, torch.arange(len(t.boxes)), t.boxes, 28) for t in targets]
    )
    each = F.binary_cross_entropy_with_logits(masks, drawn, reduction="none").mean(dim=(1, 2))
    assert sums["mask"].item() == pytest.approx(each.sum().item(), rel=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("objects", [[0, 0], [0, 3]])
@pytest.mark.parametrize("proposed", [False, True])
def test_every_parameter_has_a_gradient_whatever_is_there(kind, objects, proposed):
    heads, maps = heads_and_maps(kind)
    calls, sizes = watched(heads)
    terms_of(
        heads, maps, [boxes((0, 0, 20, 20))] * 2, batch_of(1, (64, 64), [2, 2]).targets.targets
    )
    usual, calls[:] = list(calls), []
    some = boxes((2, 2, 30, 30), (10, 5, 60, 40)) if proposed else NO_BOXES
    targets = batch_of(4, (64, 64), objects).targets.targets
    sums, _ = terms_of(heads, maps, [some, NO_BOXES], targets)
    sum(sums.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    assert calls == usual
    assert {name for name, _ in heads.named_modules() if name} >= set(calls)
    assert min(sizes) > 0
    if objects == [0, 0]:
        assert all(total == 0 for name, total in sums.items() if "cls" not in name)
        assert all((total > 0) == proposed for name, total in sums.items() if "cls" in name)
        assert all(p.grad.abs().sum() == 0 for n, p in heads.named_parameters() if "mask" in n)


@EVERY_KIND
def test_a_crowd_alone_teaches_nothing(kind):
    heads, maps = heads_and_maps(kind)
    targets = batch_of(4, (64, 64), [0, 0]).targets.targets
    crowd = [target._replace(crowd_boxes=boxes((0, 0, 64, 64))) for target in targets]
    proposals = [boxes((2, 2, 30, 30), (10, 5, 60, 40))] * 2
    _, counts = terms_of(heads, maps, proposals, targets)
    assert {count for name, count in counts.items() if "cls" in name} == {4}
    sums, counts = terms_of(heads, maps, proposals, crowd)
    assert not any(count for name, count in counts.items() if "cls" in name)
    assert sum(sums.values()) == 0


@EVERY_KIND
def test_a_set_of_boxes_alone_teaches_everything_but_masks(kind):
    heads, maps = heads_and_maps(kind)
    targets, proposals = batch_of(0, (64, 64), [3, 2]).targets.targets, [boxes((0, 0, 9, 9))] * 2
    bare = [t._replace(masks=t.masks.new_zeros(len(t.masks), 0, 0)) for t in targets]
    whole, counts = terms_of(heads, maps, proposals, targets)
    sums, counts_of_bare = terms_of(heads, maps, proposals, bare)
    masks = {name for name in sums if "mask" in name}
    assert all(sums[name] == whole[name] for name in sums.keys() - masks)
    assert all(sums[name] == 0 < whole[name] for name in masks)
    assert counts_of_bare == {**counts, **dict.fromkeys(masks, 0)}
    sum(sums.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name


@EVERY_KIND
def test_detection_of_nothing_calls_all_heads(kind):
    heads, maps = heads_and_maps(kind)
    _, sizes = watched(heads)
    seen = heads.candidates(maps, STRIDES, [NO_BOXES, NO_BOXES], SIZES)
    assert [of.boxes.shape[0] for of in seen] == [0, 0]
    assert [of.scores.shape for of in seen] == [(0, 5)] * 2
    none = torch.zeros(0, dtype=torch.int64)
    masks = heads.masks(maps, STRIDES, [NO_BOXES, NO_BOXES], [none, none])
    assert [mask.shape for mask in masks] == [(0, 28, 28)] * 2
    assert min(sizes) == 1


@EVERY_KIND
def test_candidates_and_masks_belong_to_their_image(kind):
    heads, maps = heads_and_maps(kind)
    proposals = [boxes((2, 2, 30, 30)), boxes((10, 5, 60, 40), (0, 30, 20, 60))]
    seen = heads.candidates(maps, STRIDES, proposals, SIZES)
    assert [len(of.scores) for of in seen] == [1, 2]
    second = [m[1:] for m in maps]
    alone = heads.candidates(second, STRIDES, proposals[1:], SIZES[1:])[0]
    labels = [torch.tensor([3]), torch.tensor([3, 1])]
    masks = heads.masks(maps, STRIDES, proposals, labels)
    own = heads.masks(second, STRIDES, proposals[1:], labels[1:])
    for both, one in zip((*seen[1], masks[1]), (*alone, own[0]), strict=True):
        torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-5)


@EVERY_KIND
def test_shapes_only_takes_as_many_boxes_as_are_sampled_at_most(kind):
    heads, maps = heads_and_maps(kind)
    _, sizes = watched(heads)
    heads.shapes_only(maps, STRIDES).backward()
    assert set(sizes) == {2 * ROIS, 2 * ROIS // 4}
    assert all(p.grad is not None for p in heads.parameters())
