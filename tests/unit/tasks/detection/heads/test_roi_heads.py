"""Both heads together: losses against their definition, one graph on all ranks, detections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection_batches import NO_BOXES, batch_of, boxes

from fd_large.tasks.detection.heads.mask_head import cut_masks
from fd_large.tasks.detection.heads.pooling import pool
from fd_large.tasks.detection.heads.roi_heads import RoIHeads


def heads_and_maps(seed: int = 0) -> tuple[RoIHeads, list[torch.Tensor], tuple[float, ...]]:
    torch.manual_seed(seed)
    heads = RoIHeads(5, 8, rois_per_image=16)
    maps = [torch.randn(2, 8, n, n, requires_grad=True) for n in (16, 8, 4, 2, 1)]
    return heads, maps, (4.0, 8.0, 16.0, 32.0, 64.0)


def terms_of(heads, maps, strides, proposals, targets):
    """The sums and the counts of the losses, by name."""
    draws = np.random.default_rng(0).random((2, heads.draws_per_image))
    terms = heads.terms(maps, strides, proposals, targets, draws)
    return {n: total for n, (total, _) in terms.items()}, {n: c for n, (_, c) in terms.items()}


def test_losses_of_heads_equal_the_definition():
    heads, maps, strides = heads_and_maps()
    targets = batch_of(4, (64, 64), [2, 1]).targets.targets
    # Only the objects themselves are candidates: all are for an object, four an image at most.
    sums, counts = terms_of(heads, maps, strides, [NO_BOXES, NO_BOXES], targets)
    assert counts == {"cls": 3, "box": 3, "mask": 3}
    rois = [target.boxes for target in targets]
    logits, deltas = heads.box(pool(maps, strides, rois, 7))
    labels = torch.cat([target.labels for target in targets])
    assert sums["cls"].item() == pytest.approx(
        F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5
    )
    # A proposal that is the object asks for no change.
    own = deltas[torch.arange(3), labels]
    assert sums["box"].item() == pytest.approx(own.abs().sum().item(), rel=1e-4)
    masks = heads.mask(pool(maps, strides, rois, 14))[torch.arange(3), labels]
    drawn = torch.cat(
        [cut_masks(t.masks, torch.arange(len(t.boxes)), t.boxes, 28) for t in targets]
    )
    each = F.binary_cross_entropy_with_logits(masks, drawn, reduction="none").mean(dim=(1, 2))
    assert sums["mask"].item() == pytest.approx(each.sum().item(), rel=1e-4)


@pytest.mark.parametrize("objects", [[0, 0], [0, 3]])
@pytest.mark.parametrize("proposed", [False, True])
def test_every_parameter_has_a_gradient_whatever_is_there(objects, proposed):
    heads, maps, strides = heads_and_maps()
    calls, sizes = [], []
    for name, module in heads.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for head in (heads.box, heads.mask):
        head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    some = boxes((2, 2, 30, 30), (10, 5, 60, 40)) if proposed else NO_BOXES
    targets = batch_of(4, (64, 64), objects).targets.targets
    sums, _ = terms_of(heads, maps, strides, [some, NO_BOXES], targets)
    sum(sums.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    modules = [name for name, _ in heads.named_modules() if name]
    assert sorted(calls) == sorted(modules)  # Each once.
    assert min(sizes) > 0
    if objects == [0, 0]:
        assert sums["mask"] == sums["box"] == 0
        assert (sums["cls"] > 0) == proposed
        assert all(p.grad.abs().sum() == 0 for p in heads.mask.parameters())


def test_a_crowd_alone_teaches_nothing():
    heads, maps, strides = heads_and_maps()
    targets = batch_of(4, (64, 64), [0, 0]).targets.targets
    crowd = [target._replace(crowd_boxes=boxes((0, 0, 64, 64))) for target in targets]
    proposals = [boxes((2, 2, 30, 30), (10, 5, 60, 40))] * 2
    _, counts = terms_of(heads, maps, strides, proposals, targets)
    assert counts["cls"] == 4
    sums, counts = terms_of(heads, maps, strides, proposals, crowd)
    assert counts["cls"] == 0
    assert sum(sums.values()) == 0


def test_a_set_of_boxes_alone_teaches_everything_but_masks():
    heads, maps, strides = heads_and_maps()
    targets, proposals = batch_of(0, (64, 64), [3, 2]).targets.targets, [boxes((0, 0, 9, 9))] * 2
    bare = [t._replace(masks=t.masks.new_zeros(len(t.masks), 0, 0)) for t in targets]
    whole, counts = terms_of(heads, maps, strides, proposals, targets)
    sums, counts_of_bare = terms_of(heads, maps, strides, proposals, bare)
    assert (sums["cls"], sums["box"]) == (whole["cls"], whole["box"])
    assert sums["mask"] == 0 < whole["mask"]
    assert counts_of_bare == {**counts, "mask": 0}
    sum(sums.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name


def test_detection_of_nothing_calls_both_heads():
    heads, maps, strides = heads_and_maps()
    seen = heads.candidates(maps, strides, [NO_BOXES, NO_BOXES])
    assert [(of.boxes.shape, of.scores.shape) for of in seen] == [((0, 5, 4), (0, 5))] * 2
    none = torch.zeros(0, dtype=torch.int64)
    masks = heads.masks(maps, strides, [NO_BOXES, NO_BOXES], [none, none])
    assert [mask.shape for mask in masks] == [(0, 28, 28)] * 2


def test_candidates_and_masks_belong_to_their_image():
    heads, maps, strides = heads_and_maps()
    proposals = [boxes((2, 2, 30, 30)), boxes((10, 5, 60, 40), (0, 30, 20, 60))]
    seen = heads.candidates(maps, strides, proposals)
    assert [len(of.scores) for of in seen] == [1, 2]
    second = [m[1:] for m in maps]
    alone = heads.candidates(second, strides, proposals[1:])[0]
    labels = [torch.tensor([3]), torch.tensor([3, 1])]
    masks = heads.masks(maps, strides, proposals, labels)
    own = heads.masks(second, strides, proposals[1:], labels[1:])
    for both, one in zip((*seen[1], masks[1]), (*alone, own[0]), strict=True):
        torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-5)


def test_shapes_only_takes_as_many_boxes_as_are_sampled_at_most():
    heads, maps, strides = heads_and_maps()
    sizes = []
    for head in (heads.box, heads.mask):
        head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    heads.shapes_only(maps, strides).backward()
    assert sizes == [2 * 16, 2 * 4]
    assert all(p.grad is not None for p in heads.parameters())
