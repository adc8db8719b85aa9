"""Matching, sampling, pooling, proposals, heads and losses, each against what it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection_batches import batch_of
from torchvision.ops import box_iou

from fd_large import distributed
from fd_large.tasks.detection.heads import matching
from fd_large.tasks.detection.heads.inference import LEAST_SCORE, paste, select, with_one
from fd_large.tasks.detection.heads.losses import combine
from fd_large.tasks.detection.heads.matching import BACKGROUND, IGNORED, choose, match, sample
from fd_large.tasks.detection.heads.pooling import pool
from fd_large.tasks.detection.heads.roi_heads import RoIHeads, cut_masks
from fd_large.tasks.detection.heads.rpn import CODER, anchors_of, propose, rpn_sums

NO_BOXES = torch.zeros(0, 4)
CPU = torch.device("cpu")


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def matched(objects, candidates, crowds=NO_BOXES, *, best=False, positive=0.7, negative=0.3):
    return match(
        objects,
        crowds,
        candidates,
        positive_iou=positive,
        negative_iou=negative,
        best_for_each=best,
    ).tolist()


# --- matching and sampling ---


def test_candidates_go_to_the_object_they_overlap_most():
    objects = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    candidates = boxes((0, 0, 10, 9), (20, 0, 30, 5), (21, 1, 30, 10), (50, 50, 60, 60))
    assert matched(objects, candidates) == [0, IGNORED, 1, BACKGROUND]


def test_an_object_that_nothing_overlaps_well_takes_its_nearest():
    objects, candidates = boxes((0, 0, 10, 10)), boxes((0, 0, 4, 4), (0, 0, 5, 4), (8, 8, 20, 20))
    assert matched(objects, candidates) == [BACKGROUND] * 3
    assert matched(objects, candidates, best=True) == [BACKGROUND, 0, BACKGROUND]


def test_an_object_that_nothing_touches_takes_none():
    assert matched(boxes((90, 90, 99, 99)), boxes((0, 0, 4, 4), (5, 5, 9, 9)), best=True) == [
        BACKGROUND,
        BACKGROUND,
    ]


def test_candidates_in_a_crowd_are_no_background():
    crowd = boxes((0, 0, 20, 20))
    candidates = boxes((1, 1, 9, 9), (15, 0, 25, 10), (16, 0, 26, 10), (40, 40, 50, 50))
    assert matched(NO_BOXES, candidates, crowd) == [IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    # One that is for an object stays for it.
    assert matched(boxes((1, 1, 9, 9)), candidates, crowd)[0] == 0


def test_nothing_to_match_is_background():
    assert matched(NO_BOXES, boxes((0, 0, 1, 1))) == [BACKGROUND]
    assert matched(boxes((0, 0, 1, 1)), NO_BOXES) == []


def test_choices_are_a_permutation_s_start_and_uniform():
    rng = np.random.default_rng(0)
    assert sorted(choose(9, 9, rng.random(9))) == list(range(9))
    counts = np.zeros(10)
    for _ in range(4000):
        chosen = choose(10, 3, rng.random(3))
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    # 1200 each are expected, with a spread of 29.
    assert abs(counts - 1200).max() < 120


def test_a_sample_fills_up_with_background_and_skips_the_ignored():
    numbers = torch.tensor([0] * 6 + [BACKGROUND] * 20 + [IGNORED] * 5)
    draws = np.random.default_rng(0).random(16)
    chosen = sample(numbers, 8, 0.5, draws)
    assert (numbers[chosen.positives] == 0).all()
    assert (numbers[chosen.negatives] == BACKGROUND).all()
    assert (len(chosen.positives), len(chosen.negatives)) == (4, 4)
    few = sample(numbers[5:], 8, 0.5, draws)
    assert (len(few.positives), len(few.negatives)) == (1, 7)
    none = sample(numbers[26:], 8, 0.5, draws)
    assert (len(none.positives), len(none.negatives)) == (0, 0)


# --- pooling ---


def test_a_cut_of_a_ramp_is_the_ramp():
    # The value of a place is the position of its centre, in pixels; so is that of a cut's cell.
    strides, maps = (4.0, 8.0, 16.0, 32.0), []
    for stride in strides:
        centres = (torch.arange(512 // int(stride)) + 0.5) * stride
        maps.append(torch.stack(torch.meshgrid(centres, centres, indexing="ij"))[None])
    sought = [boxes((40, 60, 68, 88), (100, 40, 324, 264)), NO_BOXES, boxes((70, 70, 482, 482))]
    maps = [level.repeat(3, 1, 1, 1) for level in maps]
    cuts = pool(maps, strides, sought, 7)
    assert cuts.shape == (3, 2, 7, 7)
    for cut, (left, top, right, bottom) in zip(cuts, torch.cat(sought).tolist(), strict=True):
        step = (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(cut[0, :, 3], top + step * (bottom - top), atol=1e-3, rtol=0)
        torch.testing.assert_close(cut[1, 3], left + step * (right - left), atol=1e-3, rtol=0)


def test_small_boxes_take_fine_levels_and_every_level_is_in_the_graph():
    maps = [
        torch.full((1, 1, n, n), float(i), requires_grad=True)
        for i, n in enumerate((64, 32, 16, 8))
    ]
    sizes = (30.0, 120.0, 230.0, 250.0)
    found = [boxes(*((0, 0, s, s) for s in sizes))]
    cuts = pool(maps, (4, 8, 16, 32), found, 2)
    assert cuts[:, 0, 0, 0].tolist() == [0, 1, 2, 2]
    pool(maps, (4, 8, 16, 32), [NO_BOXES], 2).sum().backward()
    assert all(level.grad is not None for level in maps)


# --- proposals ---


def test_anchors_stand_on_the_strides_of_odd_maps():
    fine, coarse = anchors_of(((3, 5), (2, 3)), (4.0, 8.0), CPU)
    assert fine.shape == (3 * 5 * 3, 4)
    square = fine.view(3, 5, 3, 4)[:, :, 1]
    assert square[2, 4].tolist() == [4 * 4 - 16, 2 * 4 - 16, 4 * 4 + 16, 2 * 4 + 16]
    assert (coarse.view(2, 3, 3, 4)[1, 2, 1] + coarse.new_tensor([32, 32, -32, -32])).tolist() == [
        16, 8, 16, 8,
    ]  # fmt: skip
    tall = fine.view(3, 5, 3, 4)[0, 0, 2]
    assert tall[3] - tall[1] > tall[2] - tall[0]


def proposals_from(logits, deltas, anchors, size=(100, 100), *, before=100, after=100):
    return propose(
        [logits],
        [deltas],
        [anchors],
        torch.tensor([size]),
        before_nms=before,
        after_nms=after,
    )[0]


def test_proposals_are_cut_sorted_and_thinned():
    anchors = boxes((-5, 10, 20, 30), (-5, 10, 20, 31), (40, 40, 60, 60), (200, 0, 220, 20))
    logits, deltas = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4, 4)
    found = proposals_from(logits, deltas, anchors)
    # The last lies outside, the first is a copy of the better second.
    assert found.tolist() == [[40, 40, 60, 60], [0, 10, 20, 31]]
    assert len(proposals_from(logits, deltas, anchors, after=1)) == 1
    moved = proposals_from(logits, deltas + torch.tensor([0.5, 0, 0, 0]), anchors)
    assert moved[0].tolist() == [50, 40, 70, 60]


def test_no_proposal_comes_of_numbers_that_are_none():
    anchors = boxes((0, 0, 20, 30), (40, 40, 60, 60))
    nothing = torch.tensor([[torch.nan, 1.0]])
    assert len(proposals_from(nothing, torch.zeros(1, 2, 4), anchors)) == 1
    assert len(proposals_from(nothing[:, 1:], torch.full((1, 1, 4), torch.nan), anchors[1:])) == 0
    assert len(proposals_from(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, (0, 0))) == 0


def test_losses_of_proposals_equal_the_definition():
    batch = batch_of(3, (64, 96), [3, 0])
    anchors = torch.cat(anchors_of(((16, 24), (8, 12)), (4.0, 8.0), CPU))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(anchors), generator=generator)
    deltas = torch.randn(2, len(anchors), 4, generator=generator)
    # As many draws as there are anchors: all that are no matter of doubt are looked at.
    count = 2 * len(anchors)
    draws = np.random.default_rng(0).random((2, 2 * count))
    sums, counts = rpn_sums(
        logits, deltas, anchors, batch.targets.targets, draws, anchors_per_image=count
    )
    cls = box = looked_at = 0.0
    for i, target in enumerate(batch.targets.targets):
        overlap = (
            box_iou(anchors, target.boxes) if len(target.boxes) else torch.zeros(len(anchors), 1)
        )
        best = overlap.amax(dim=0)
        for a, row in enumerate(overlap):
            nearest = bool(((row == best) & (row > 0)).any())
            positive = row.max() >= 0.7 or nearest
            if positive or row.max() < 0.3:
                looked_at += 1
                cls += F.softplus(-logits[i, a] if positive else logits[i, a]).item()
            if positive:
                wanted = CODER.encode_single(target.boxes[row.argmax()][None], anchors[a][None])
                box += (deltas[i, a] - wanted[0]).abs().sum().item()
    assert counts["anchors"].item() == looked_at
    assert sums["rpn_cls"].item() == pytest.approx(cls, rel=1e-4)
    assert sums["rpn_box"].item() == pytest.approx(box, rel=1e-4)


# --- heads ---


def heads_and_maps(seed: int = 0) -> tuple[RoIHeads, list[torch.Tensor], tuple[float, ...]]:
    torch.manual_seed(seed)
    heads = RoIHeads(5, 8, rois_per_image=16, detections_per_image=10)
    maps = [torch.randn(2, 8, n, n, requires_grad=True) for n in (16, 8, 4, 2, 1)]
    return heads, maps, (4.0, 8.0, 16.0, 32.0, 64.0)


def draws_of(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((rows, 32))


def test_losses_of_heads_equal_the_definition():
    heads, maps, strides = heads_and_maps()
    targets = batch_of(4, (64, 64), [2, 1]).targets.targets
    # Only the objects themselves are candidates: all are for an object, four an image at most.
    sums, counts = heads.sums(maps, strides, [NO_BOXES, NO_BOXES], targets, draws_of())
    assert {name: value.item() for name, value in counts.items()} == {"boxes": 3, "positives": 3}
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
    sums, _ = heads.sums(maps, strides, [some, NO_BOXES], targets, draws_of())
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
    _, counts = heads.sums(maps, strides, proposals, targets, draws_of())
    assert counts["boxes"] == 4
    sums, counts = heads.sums(maps, strides, proposals, crowd, draws_of())
    assert counts["boxes"] == 0
    assert sum(sums.values()) == 0


def test_detection_of_nothing_calls_both_heads():
    heads, maps, strides = heads_and_maps()
    seen = heads.detect(maps, strides, [NO_BOXES, NO_BOXES], torch.tensor([[64, 64], [64, 64]]))
    assert [tuple(len(part) for part in image) for image in seen] == [(0, 0, 0, 0)] * 2
    assert seen[0].masks.shape == (0, 28, 28)


def test_detections_belong_to_their_image():
    heads, maps, strides = heads_and_maps()
    with torch.no_grad():
        heads.box.classes.bias[3] = 5.0  # One class is sure.
    proposals = [boxes((2, 2, 30, 30)), boxes((10, 5, 60, 40), (0, 30, 20, 60))]
    sizes = torch.tensor([[64, 64], [64, 32]])
    seen = heads.detect(maps, strides, proposals, sizes)
    assert [image.labels.tolist() for image in seen] == [[3], [3, 3]]
    assert seen[1].boxes[:, 2].max() <= 32
    assert all((image.scores > 0.9).all() for image in seen)
    alone = heads.detect([m[1:] for m in maps], strides, proposals[1:], sizes[1:])[0]
    for both, one in zip(seen[1], alone, strict=True):
        torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-5)


# --- what is kept, and masks on pixels ---


def test_boxes_are_chosen_by_class():
    at = boxes((0, 0, 10, 10), (1, 0, 11, 10), (0, 0, 10, 10))[:, None].repeat(1, 2, 1)
    scores = torch.tensor([[0.9, 0.2], [0.8, LEAST_SCORE / 2], [0.1, 0.6]])
    found, score, label = select(at, scores, torch.tensor([50, 5]), at_most=10)
    assert list(zip(label.tolist(), score.tolist(), strict=True)) == [
        (0, pytest.approx(0.9)),
        (1, pytest.approx(0.6)),
    ]
    assert found[0].tolist() == [0, 0, 5, 10]
    assert len(select(at, scores, torch.tensor([50, 50]), at_most=1)[0]) == 1


def test_a_mask_fills_its_box():
    masks = torch.ones(3, 4, 4)
    masks[1, :, 2:] = 0
    at = boxes((2, 1, 6, 5), (0, 0, 8, 8), (-4, 6, 3, 14))
    pasted = paste(masks, at, 8, 10)
    assert pasted.shape == (3, 8, 10)
    wanted = torch.zeros(8, 10, dtype=torch.bool)
    wanted[1:5, 2:6] = True
    assert torch.equal(pasted[0], wanted)
    assert torch.equal(pasted[1].sum(0), torch.tensor([8, 8, 8, 8, 0, 0, 0, 0, 0, 0]))
    assert pasted[2].sum() == 2 * 3
    assert pasted[2][6:, :3].all()


def test_a_mask_cut_out_and_pasted_back_is_the_mask():
    rows, columns = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    disc = ((rows - 31) ** 2 + (columns - 42) ** 2 < 22**2)[None]
    at = boxes((20, 9, 65, 54))
    cut = cut_masks(disc.byte(), torch.tensor([0]), at, 28)
    back = paste(cut, at, 60, 80)
    union, common = (back | disc).sum(), (back & disc).sum()
    assert common / union > 0.94
    for places in (rows, columns):  # And does not move: half a pixel would show.
        assert places[back[0]].mean().item() == pytest.approx(
            places[disc[0]].mean().item(), abs=0.1
        )


def test_one_box_is_added_only_where_there_is_none():
    assert [len(b) for b in with_one([NO_BOXES, NO_BOXES])] == [1, 0]
    assert [len(b) for b in with_one([NO_BOXES, boxes((0, 0, 1, 1))])] == [0, 1]


# --- the sum ---


def test_a_rank_s_loss_is_over_what_all_ranks_looked_at(monkeypatch):
    sums = {"rpn_cls": 6.0, "rpn_box": 3.0, "cls": 8.0, "box": 4.0, "mask": 0.0}
    counts = {"anchors": 10.0, "boxes": 0.0, "positives": 0.0}
    other = {"anchors": 20.0, "boxes": 8.0, "positives": 0.0}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        distributed,
        "sum_tensor",
        lambda own: own + torch.tensor([other[name] for name in sorted(other)]),
    )
    loss, terms = combine(
        {name: torch.tensor(value) for name, value in sums.items()},
        {name: torch.tensor(value) for name, value in counts.items()},
    )
    # Twice the share: the mean over two ranks is then the sum over both through all counts.
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"rpn_cls": 0.4, "rpn_box": 0.2, "cls": 2.0, "box": 1.0, "mask": 0.0}
    )
    assert loss.item() == pytest.approx(3.6)


def test_many_objects_are_matched_a_few_at_a_time(monkeypatch):
    """At 1536 pixels 100 objects took 2 GB in one go: 589,248 anchors."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 80
    places = torch.cat([corner, corner + 5 + torch.rand(300, 2, generator=generator) * 30], dim=1)
    objects, candidates = places[:50], places[50:]
    rows = []

    def counted(some, others):
        rows.append(len(some))
        return box_iou(some, others)

    monkeypatch.setattr(matching, "box_iou", counted)
    found = matched(objects, candidates, best=True)
    assert sum(rows) == 50
    assert max(rows) <= 8
    monkeypatch.setattr(matching, "OBJECTS_AT_ONCE", 50)
    assert matched(objects, candidates, best=True) == found
    assert sum(number >= 0 for number in found) > 20


def test_a_set_of_boxes_alone_teaches_everything_but_masks():
    batch = batch_of(0, (64, 64), [3, 2])
    bare = [t._replace(masks=t.masks.new_zeros(len(t.masks), 0, 0)) for t in batch.targets.targets]
    torch.manual_seed(0)
    heads = RoIHeads(5, 8, rois_per_image=16, detections_per_image=5)
    maps = [torch.randn(2, 8, 16 // 2**level, 16 // 2**level) for level in range(5)]
    strides, draws = [4.0, 8.0, 16.0, 32.0, 64.0], np.full((2, 32), 0.5)
    proposals = [boxes((0, 0, 9, 9))] * 2
    whole, counts = heads.sums(maps, strides, proposals, batch.targets.targets, draws)
    sums, counts_of_bare = heads.sums(maps, strides, proposals, bare, draws)
    assert (sums["cls"], sums["box"]) == (whole["cls"], whole["box"])
    assert sums["mask"] == 0 < whole["mask"]
    assert counts_of_bare["boxes"] == counts["boxes"]
    sum(sums.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
