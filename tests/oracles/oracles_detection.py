"""Checks of oracle files of detection: coding of boxes, soft-NMS, cascades and HTC."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from oracles_dense import Errors
from oracles_models import Row, Tensors
from torch import Tensor, nn
from torchvision.ops import nms
from torchvision.ops.poolers import LevelMapper

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.tasks.dense.convolution import ChannelNorm, NormedConvolution
from fd_large.tasks.detection.data.target import SEMANTIC_STRIDE, Target
from fd_large.tasks.detection.heads import box_coder, pooling
from fd_large.tasks.detection.heads.box_head import Sampled, box_losses
from fd_large.tasks.detection.heads.cascade import NUM_STAGES, CascadeHeads, Stage
from fd_large.tasks.detection.heads.htc import HtcHeads
from fd_large.tasks.detection.heads.mask_head import of_class
from fd_large.tasks.detection.heads.roi_heads import Candidates
from fd_large.tasks.detection.heads.rpn import cut_to
from fd_large.tasks.detection.heads.selection import Chosen, Selection
from fd_large.tasks.detection.heads.soft_nms import soft_nms

SCORE_TOLERANCE = 2e-6  # Absolute.
# What is chosen is compared in float32 alone, as the files have it of that: the rounding of boxes
# that were moved apart by class, and of what two float32 runs give.
DETECTIONS_TOLERANCE = 5e-5
METHODS = {"hard": "nms", "linear": "soft_nms_linear", "gaussian": "soft_nms_gaussian"}
"""Ours, and their names in mmdetection's files."""


# --- coding of boxes, and the loss of boxes ---


def check_box_coder(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Differences of each stage both ways, and the loss of boxes with its gradient."""
    errors = Errors(spec, tensors)
    pred, target = (tensors[name].to(dtype) for name in ("pred", "target"))
    deltas, weight = tensors["deltas"].to(dtype), tensors["weight"].to(dtype)
    height_width = torch.tensor(spec.get("max_shape", [64, 80]))
    for number, coder in enumerate(box_coder.MMDET):
        published = torch.tensor(spec["target_stds"][number]).reciprocal()
        errors.rows.append(
            Row(
                f"units {number}",
                (torch.tensor(coder.weights) / published - 1).abs().max().item(),
                1e-6,
            )
        )
        errors.out(f"out.encode.stage{number}", coder.encode_single(target, pred))
        decoded = coder.decode_single(deltas, pred)
        errors.out(f"out.decode.stage{number}", decoded)
        errors.out(
            f"out.decode_clipped.stage{number}", cut_to(decoded[None], height_width[None])[0]
        )
    # Differences of nothing: the loss is of the boxes themselves.
    boxes = nn.Parameter(pred.clone())
    each = torch.stack([_giou(boxes[i : i + 1], target[i : i + 1]) for i in range(len(pred))])
    errors.out("out.giou_loss", each)
    total = (each * weight).sum() / len(each)
    errors.out("out.giou_loss_weighted", total)
    total.backward()
    errors.gradient("grad.giou_pred", boxes.grad, tensors["grad.giou_pred"])
    return errors.rows


def _giou(box: Tensor, target: Tensor) -> Tensor:
    """The loss of a box (1, 4), as `box_losses` has it of what a coder decodes."""

    class Itself:
        @staticmethod
        def decode_single(deltas: Tensor, rois: Tensor) -> Tensor:
            return deltas

    one = torch.zeros(1, dtype=torch.int64)
    sampled = Sampled([target], one, [one], target, [one])
    logits = box.new_zeros(1, 2)
    return box_losses(logits, box[:, None], sampled, coder=Itself, box_loss="giou")[1]


# --- soft-NMS ---


def check_soft_nms(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Order and scores of all methods, alone, by class, and of many classes with a limit."""
    rows: list[Row] = []
    for number, case in enumerate(spec["config"]["cases"]):
        boxes, scores = tensors[f"boxes.{number}"], tensors[f"scores.{number}"]
        labels = tensors[f"labels.{number}"].long()
        # Widths and heights that count their last pixel.
        wide = boxes + torch.tensor([0, 0, case["offset"], case["offset"]])
        rule = {"iou": case["iou"], "sigma": case["sigma"], "least_score": case["min_score"]}
        one = torch.zeros_like(labels)

        def same(
            label: str, kept: Tensor, got: Tensor, number: int = number, boxes: Tensor = boxes
        ) -> None:
            expected = tensors[f"out.{label}.{number}"]
            index = tensors[f"out.{label}_index.{number}"].long()
            rows.append(Row(f"{label}_index.{number}", float(not torch.equal(kept, index)), 0.0))
            rows.append(_scores_row(f"{label}.{number}", boxes[kept], got, expected))

        for method in ("linear", "gaussian"):
            # Those that go class by class take no offset.
            for label, at, of in ((method, wide, one), (f"batched_{method}", boxes, labels)):
                kept = soft_nms(at, scores, of, at_most=len(boxes), decay=method, **rule)
                same(label, *kept)
            sure = tensors[f"scores_by_class.{number}"][:, :-1]
            row, column = torch.where(sure > case["score_thr"])
            kept, got = soft_nms(
                boxes[row], sure[row, column], column, at_most=case["max_num"], decay=method, **rule
            )
            label = f"multiclass_{method}"
            expected = tensors[f"out.{label}.{number}"]
            classes = tensors[f"out.{label}_labels.{number}"].long()
            wrong = not torch.equal(column[kept], classes)
            rows.append(Row(f"{label}_labels.{number}", float(wrong), 0.0))
            rows.append(_scores_row(f"{label}.{number}", boxes[row[kept]], got, expected))
        for label in ("naive", "nms"):  # What is left out is left out, whatever it is called.
            kept = nms(wide, scores, case["iou"])
            same(
                label,
                kept[scores[kept] >= case["min_score"]] if label == "naive" else kept,
                scores[kept[scores[kept] >= case["min_score"]] if label == "naive" else kept],
            )
    return rows


def _scores_row(label: str, boxes: Tensor, scores: Tensor, expected: Tensor) -> Row:
    got = torch.cat([boxes, scores[:, None]], dim=1)
    if got.shape != expected.shape:
        return Row(label, math.inf, SCORE_TOLERANCE)
    worst = (got - expected).abs().max().item() if len(got) else 0.0
    return Row(label, worst, SCORE_TOLERANCE)


# --- cascades ---


@contextmanager
def levels(canonical: float) -> Iterator[None]:
    """Lets boxes of so many pixels take the third level."""
    own = pooling._LEVELS
    pooling._LEVELS = LevelMapper(2, 5, canonical_scale=canonical, canonical_level=4)
    try:
        yield
    finally:
        pooling._LEVELS = own


class Recorded:
    """What the stages of some heads were given and made, in their order."""

    def __init__(self, heads: CascadeHeads):
        self.stages: list[Stage] = []
        self.sampled: list[Sampled] = []
        self.refined: list[list[Tensor]] = []
        stage, terms, handed_on = heads._stage, heads._box_terms, heads._handed_on

        def note_stage(*of: Any) -> Stage:
            self.stages.append(stage(*of))
            return self.stages[-1]

        def note_terms(number: int, of: Stage, sampled: Sampled) -> Any:
            self.sampled.append(sampled)
            return terms(number, of, sampled)

        def note_handed_on(number: int, of: Stage, sampled: Sampled, proposals: Any, sizes: Any):
            self.refined.append(handed_on(number, of, sampled, proposals, sizes))
            return self.refined[-1]

        heads._stage, heads._box_terms, heads._handed_on = note_stage, note_terms, note_handed_on


_MMDET_NAMES = (
    (r"bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.", r"boxes.\1.convolutions.\2.convolution."),
    (r"bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.", r"boxes.\1.convolutions.\2.norm."),
    (r"bbox_head\.(\d+)\.shared_fcs\.0\.", r"boxes.\1.whole.0."),
    (r"bbox_head\.(\d+)\.shared_fcs\.1\.", r"boxes.\1.whole.2."),
    (r"bbox_head\.(\d+)\.fc_cls\.", r"boxes.\1.classes."),
    (r"bbox_head\.(\d+)\.fc_reg\.", r"boxes.\1.boxes."),
)
_DETECTRON2_NAMES = (
    (r"box_head\.(\d+)\.conv(\d+)\.norm\.", r"boxes.\1.convolutions.\2.norm."),
    (r"box_head\.(\d+)\.conv(\d+)\.", r"boxes.\1.convolutions.\2.convolution."),
    (r"box_head\.(\d+)\.fc(\d+)\.", r"boxes.\1.whole.0."),
    (r"box_predictor\.(\d+)\.cls_score\.", r"boxes.\1.classes."),
    (r"box_predictor\.(\d+)\.bbox_pred\.", r"boxes.\1.boxes."),
)


def ours(name: str, names: Sequence[tuple[str, Any]]) -> str:
    """Our name of a parameter of published heads."""
    for pattern, own in names:
        name, count = re.subn(rf"^(?:{pattern})", own, name)
        if count:
            return name
    raise KeyError(name)


def shape_box_heads(heads: CascadeHeads, config: dict, *, convolutions: int, layers: int) -> None:
    """Gives the box heads as many layers, norms and channels as a file has."""
    width, wide = config["channels"], config["fc"]
    norm = BatchNorm if "num_shared_convs" in config else lambda n: ChannelNorm(n, 1e-6)
    for head in heads.boxes:
        head.convolutions = nn.Sequential(
            *(NormedConvolution(width, width, 3, relu=True, norm=norm) for _ in range(convolutions))
        )
        parts: list[nn.Module] = [nn.Linear(width * 7 * 7, wide)]
        for _ in range(layers - 1):
            parts += [nn.ReLU(), nn.Linear(wide, wide)]
        head.whole = nn.Sequential(*parts)
        head.classes = nn.Linear(wide, head.classes.out_features)
        head.boxes = nn.Linear(wide, head.boxes.out_features)


def fill(heads: nn.Module, tensors: Tensors, names: Any, dtype: torch.dtype) -> None:
    """Loads weights and running statistics of a file, all of them."""
    held = {
        ours(name.partition(".")[2], names): tensor
        for name, tensor in tensors.items()
        if name.startswith(("weights.", "buffers."))
    }
    heads.load_state_dict({**_masks_of(heads, held), **held}, strict=True)
    heads.to(dtype)


def _masks_of(heads: nn.Module, held: Tensors) -> Tensors:
    """The heads' own weights of masks where a file has none."""
    if any(name.startswith("mask_heads.") for name in held):
        return {}
    return {n: t for n, t in heads.state_dict().items() if n.startswith("mask_heads.")}


def inputs_of(tensors: Tensors, dtype: torch.dtype) -> list[nn.Parameter]:
    """The levels of the pyramid."""
    count = sum(name.startswith("input.") for name in tensors)
    return [nn.Parameter(tensors[f"input.{i}"].to(dtype)) for i in range(count)]


def targets_of(spec: dict, tensors: Tensors, labels: str, dtype: torch.dtype) -> list[Target]:
    """What is in the images; masks only where a file has them."""
    height, width = spec["config"]["padded"]
    found = []
    for i in range(len(spec["config"]["images"])):
        boxes = tensors[f"gt_boxes.{i}"].to(dtype)
        masks = torch.zeros(len(boxes), 0, 0, dtype=torch.uint8)
        if f"gt_masks.{i}" in tensors:
            own = tensors[f"gt_masks.{i}"]
            masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
            masks[:, : own.shape[1], : own.shape[2]] = own
        target = Target(boxes, tensors[f"{labels}.{i}"].long(), masks, boxes.new_zeros(0, 4), i)
        if "gt_semantic" in tensors:
            semantic = tensors["gt_semantic"][i, 0, ::SEMANTIC_STRIDE, ::SEMANTIC_STRIDE]
            target = target._replace(semantic=semantic)
        found.append(target)
    return found


def proposals_of(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    return [tensors[f"proposals.{i}"].to(dtype) for i in range(len(spec["config"]["images"]))]


def compare_training(
    errors: Errors,
    spec: dict,
    tensors: Tensors,
    heads: CascadeHeads,
    maps: list[nn.Parameter],
    dtype: torch.dtype,
) -> None:
    """Rows, targets, predictions, refined boxes and losses of mmdetection's stages."""
    sizes, targets = torch.tensor(spec["config"]["images"]), None
    targets = targets_of(spec, tensors, "gt_labels", dtype)
    draws = np.zeros((len(targets), heads.draws_per_image))
    heads.train()
    seen = Recorded(heads)
    proposals = proposals_of(spec, tensors, dtype)
    terms = heads.terms(maps, spec["config"]["strides"], proposals, sizes, targets, draws)
    given = [proposals, *seen.refined]
    for number in range(NUM_STAGES):
        stage, sampled = seen.stages[number], seen.sampled[number]
        sources = [len(of) for of in given[number]]
        order, source = published_rows(sampled, targets, sources)
        label = f"out.train.stage{number}"
        image = torch.cat([torch.full((len(r), 1), float(i)) for i, r in enumerate(sampled.rois)])
        errors.out(f"{label}.rois", torch.cat([image, torch.cat(sampled.rois)], 1)[order])
        errors.out(f"{label}.source", source)
        errors.out(f"{label}.labels", sampled.labels[order])
        errors.out(f"{label}.label_weights", torch.ones(len(order)))
        errors.out(f"{label}.cls_score", stage.logits[order])
        errors.out(f"{label}.bbox_pred", stage.deltas[order].flatten(1))
        wanted, weights = torch.zeros(len(order), 4, dtype=dtype), torch.zeros(len(order), 4)
        wanted[sampled.foreground], weights[sampled.foreground] = sampled.boxes, 1
        if heads.box_loss != "giou":
            rois = torch.cat(sampled.rois)[sampled.foreground]
            coder = heads.form.coders[number]
            wanted[sampled.foreground] = coder.encode_single(sampled.boxes, rois)
        errors.out(f"{label}.bbox_targets", wanted[order])
        errors.out(f"{label}.bbox_weights", weights[order])
        for i, rows in enumerate(image_rows(order, sampled)):
            if f"{label}.refined.{i}" in tensors:
                proposed = sampled.numbers[i] < sources[i]
                place = proposed.cumsum(0) - 1
                kept = rows[proposed[rows]]
                errors.out(f"{label}.refined.{i}", seen.refined[number][i][place[kept]])
        right = (stage.logits.argmax(1)[: len(order)] == sampled.labels).double().mean()
        errors.out(f"out.train.s{number}.acc", 100 * right)
        for ours_, theirs in (("cls", "cls"), ("box", "bbox"), ("mask", "mask")):
            if f"out.train.s{number}.loss_{theirs}" in tensors:
                total, count = terms[f"{ours_}_{number + 1}"]
                errors.out(f"out.train.s{number}.loss_{theirs}", total / count)
    if "out.train.loss_semantic_seg" in tensors:
        total, count = terms["semantic"]
        errors.out("out.train.loss_semantic_seg", total / count)
    loss = sum(total / max(count, 1) for total, count in terms.values())
    errors.out("out.train.total", loss)
    loss.backward()


def published_rows(
    sampled: Sampled, targets: Sequence[Target], sources: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Our rows in mmdetection's order, where objects stand before proposals, and its numbers."""
    first, order, source = 0, [], []
    for numbers, of, target, count in zip(
        sampled.numbers, sampled.objects, targets, sources, strict=True
    ):
        theirs = torch.where(numbers < count, numbers + len(target.boxes), numbers - count)
        rows = torch.cat([theirs[: len(of)].argsort(), len(of) + theirs[len(of) :].argsort()])
        order.append(first + rows)
        source.append(theirs[rows])
        first += len(numbers)
    return torch.cat(order), torch.cat(source)


def image_rows(order: Tensor, sampled: Sampled) -> Iterable[Tensor]:
    """An order of all rows as that of each image's."""
    first = 0
    for rows in order.split([len(roi) for roi in sampled.rois]):
        yield rows - first
        first += len(rows)


def compare_test(
    errors: Errors,
    spec: dict,
    tensors: Tensors,
    heads: CascadeHeads,
    maps: list[nn.Parameter],
    dtype: torch.dtype,
) -> None:
    """Predictions of mmdetection's stages, their mean, and what is chosen of them."""
    heads.eval()
    sizes = torch.tensor(spec["config"]["images"])
    seen = Recorded(heads)
    proposals = proposals_of(spec, tensors, dtype)
    with torch.no_grad():
        found = heads.candidates(maps, spec["config"]["strides"], proposals, sizes)
    for number, stage in enumerate(seen.stages):
        label = f"out.test.stage{number}"
        image = torch.cat([torch.full((len(r), 1), float(i)) for i, r in enumerate(stage.rois)])
        errors.out(f"{label}.rois", torch.cat([image, torch.cat(list(stage.rois))], 1))
        errors.out(f"{label}.cls_score", stage.logits)
        errors.out(f"{label}.bbox_pred", stage.deltas.flatten(1))
    for i, (of, size) in enumerate(zip(found, sizes, strict=True)):
        cut = cut_to(of.boxes.flatten(0, 1)[None], size[None])[0]
        errors.out(f"out.test.boxes.{i}", cut.view_as(of.boxes).flatten(1))
        errors.out(f"out.test.scores.{i}", with_background(of.scores))
        for method, name in METHODS.items() if dtype == torch.float32 else ():
            chosen = chosen_of(of, size, spec, method)
            errors.rows += detection_rows(
                f"{name}.{i}",
                chosen,
                tensors[f"out.detections_float32.{name}.{i}"],
                tensors[f"out.detection_labels_float32.{name}.{i}"],
            )


def with_background(scores: Tensor) -> Tensor:
    return torch.cat([scores, 1 - scores.sum(1, keepdim=True)], dim=1)


def chosen_of(of: Candidates, size: Tensor, spec: dict, method: str) -> Chosen:
    config = spec["config"]
    rule = Selection(
        nms=method,  # type: ignore[arg-type]
        iou=config.get("nms_iou", 0.5),
        least_score=config.get("score_thr", 0.05),
        at_most=config.get("max_per_img", 100),
    )
    return rule.of_candidates(of.boxes.float(), of.scores.float(), size)


def detection_rows(label: str, chosen: Chosen, boxes: Tensor, labels: Tensor) -> list[Row]:
    """Scores in their order; boxes and labels by their nearest, as scores may be all but equal."""
    scale = boxes[:, :4].abs().max()
    got, expected = (
        torch.cat([box / scale, score[:, None], 10.0 * of[:, None]], dim=1)
        for box, score, of in (
            (chosen.boxes, chosen.scores, chosen.labels),
            (boxes[:, :4], boxes[:, 4], labels),
        )
    )
    if got.shape != expected.shape:
        return [Row(f"number after {label}", math.inf, 0.0)]
    apart = (got[:, None] - expected[None]).abs().amax(dim=2)
    worst = max(apart.amin(dim=0).max().item(), apart.amin(dim=1).max().item())
    scores = (chosen.scores - boxes[:, 4]).abs().max().item()
    return [
        Row(f"scores after {label}", scores, DETECTIONS_TOLERANCE),
        Row(f"detections after {label}", worst, DETECTIONS_TOLERANCE),
    ]


def gradients(
    errors: Errors, tensors: Tensors, heads: nn.Module, maps: list[nn.Parameter], names: Any
) -> None:
    """All gradients of a file."""
    held = {**dict(heads.named_parameters()), **{f"input.{i}": x for i, x in enumerate(maps)}}
    for label, expected in tensors.items():
        if label.startswith("grad."):
            name = label.removeprefix("grad.")
            own = held[name if name in held else ours(name, names)]
            errors.gradient(label, own.grad, expected)


def check_cascade(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """mmdetection's cascade, training and test."""
    config, errors = spec["config"], Errors(spec, tensors)
    heads = _mmdet_heads(CascadeHeads, config)
    fill(heads, tensors, _MMDET_NAMES, dtype)
    with levels(4 * config["finest_scale"]):
        maps = inputs_of(tensors, dtype)
        compare_test(errors, spec, tensors, heads, maps, dtype)
        compare_training(errors, spec, tensors, heads, maps, dtype)
    gradients(errors, tensors, heads, maps, _MMDET_NAMES)
    return errors.rows


def _mmdet_heads(kind: Any, config: dict, **more: Any) -> Any:
    """Heads with a cascade, shaped as mmdetection's configuration says."""
    heads = kind(
        config["num_classes"],
        config["channels"],
        rois_per_image=many(config),
        box_loss=config["loss_bbox"],
        class_agnostic=config["class_agnostic"],
        **more,
    )
    heads.best_for_each = config["match_low_quality"]
    shape_box_heads(
        heads, config, convolutions=config["num_shared_convs"], layers=config["num_shared_fcs"]
    )
    return heads


def check_cascade_detectron2(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """detectron2's cascade, training and test."""
    config, errors = spec["config"], Errors(spec, tensors)
    heads = CascadeHeads(
        config["num_classes"],
        config["channels"],
        rois_per_image=many(config),
        form="detectron2",
        box_loss="l1",
    )
    shape_box_heads(heads, config, convolutions=config["convs"], layers=1)
    # They count from 1.
    counted = {
        re.sub(r"(box_head\.\d+\.conv)(\d+)", lambda of: f"{of[1]}{int(of[2]) - 1}", name): tensor
        for name, tensor in tensors.items()
    }
    fill(heads, counted, _DETECTRON2_NAMES, dtype)
    strides = config.get("strides", (4, 8, 16, 32))
    sizes = torch.tensor(config["images"])
    proposals = proposals_of(spec, tensors, dtype)
    with levels(config["canonical_box_size"]):
        maps = inputs_of(tensors, dtype)
        _compare_test_detectron2(errors, spec, tensors, heads.eval(), maps, dtype)
        heads.train()
        seen = Recorded(heads)
        targets = targets_of(spec, tensors, "gt_classes", dtype)
        draws = np.zeros((len(targets), heads.draws_per_image))
        terms = heads.terms(maps, strides, proposals, sizes, targets, draws)
    for number, (stage, sampled) in enumerate(zip(seen.stages, seen.sampled, strict=True)):
        label, order, first = f"out.train.stage{number}", [], 0
        for i, roi in enumerate(sampled.rois):
            theirs = tensors[f"{label}.boxes.{i}"].to(dtype)
            errors.rows.append(Row(f"{label}: rois", float(len(roi) != len(theirs)), 0.0))
            order.append(first + (theirs[:, None] - roi[None]).abs().amax(2).argmin(1))
            errors.out(f"{label}.boxes.{i}", torch.cat(sampled.rois)[order[-1]])
            errors.out(f"{label}.classes.{i}", sampled.labels[order[-1]])
            first += len(roi)
        rows = torch.cat(order)
        errors.out(f"{label}.cls_score", stage.logits[rows])
        errors.out(f"{label}.deltas", stage.deltas[rows, 0])
        for own, name in (("cls", "loss_cls"), ("box", "loss_box_reg")):
            total, count = terms[f"{own}_{number + 1}"]
            errors.out(f"out.train.{name}_stage{number}", total / count)
    sum(t / max(c, 1) for name, (t, c) in terms.items() if "mask" not in name).backward()
    stored = {n: t for n, t in counted.items() if n.startswith("grad.")}
    gradients(errors, stored, heads, maps, _DETECTRON2_NAMES)
    return errors.rows


def _compare_test_detectron2(
    errors: Errors,
    spec: dict,
    tensors: Tensors,
    heads: CascadeHeads,
    maps: list[nn.Parameter],
    dtype: torch.dtype,
) -> None:
    strides, sizes = spec["config"].get("strides", (4, 8, 16, 32)), spec["config"]["images"]
    seen = Recorded(heads)
    with torch.no_grad():
        found = heads.candidates(
            maps, strides, proposals_of(spec, tensors, dtype), torch.tensor(sizes)
        )
    for number, stage in enumerate(seen.stages):
        label = f"out.test.stage{number}"
        errors.out(f"{label}.cls_score", stage.logits)
        errors.out(f"{label}.deltas", stage.deltas[:, 0])
        for i, roi in enumerate(stage.rois):
            errors.out(f"{label}.boxes.{i}", roi)
    for i, (of, size) in enumerate(zip(found, torch.tensor(sizes), strict=True)):
        errors.out(f"out.test.final_boxes.{i}", of.boxes[:, 0])
        errors.out(f"out.test.mean_probabilities.{i}", with_background(of.scores))
        if dtype == torch.float32:
            errors.rows += detection_rows(
                f"nms.{i}",
                chosen_of(of, size, spec, "hard"),
                tensors[f"out.detections_float32.{i}"],
                tensors[f"out.detection_classes_float32.{i}"],
            )


_HTC_NAMES = (
    *_MMDET_NAMES,
    (r"mask_head\.(\d+)\.convs\.(\d+)\.conv\.", r"mask_heads.\1.convolutions.\2.0."),
    (r"mask_head\.(\d+)\.upsample\.", r"mask_heads.\1.doubling."),
    (r"mask_head\.(\d+)\.conv_logits\.", r"mask_heads.\1.masks."),
    (r"mask_head\.(\d+)\.conv_res\.conv\.", lambda of: f"mask_flows.{int(of[1]) - 1}."),
    (r"semantic_head\.lateral_convs\.(\d+)\.conv\.", r"semantic.laterals.\1."),
    (r"semantic_head\.convs\.(\d+)\.conv\.", r"semantic.convolutions.\1."),
    (r"semantic_head\.conv_embedding\.conv\.", r"semantic.embedding."),
    (r"semantic_head\.conv_logits\.", r"semantic.classes."),
)


def check_htc(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """HTC with its semantic branch, training and test."""
    config, errors = spec["config"], Errors(spec, tensors)
    heads = _mmdet_heads(HtcHeads, config, semantic_classes=config.get("sem_classes", 0))
    for head in heads.mask_heads:
        head.convolutions = nn.Sequential(
            *(nn.Sequential(_convolution(config), nn.ReLU()) for _ in range(config["mask_convs"]))
        )
    if heads.semantic:
        heads.semantic.convolutions = nn.ModuleList(
            _convolution(config) for _ in range(config["sem_convs"])
        )
    fill(heads, tensors, _HTC_NAMES, dtype)
    with levels(4 * config["finest_scale"]):
        maps = inputs_of(tensors, dtype)
        compare_test(errors, spec, tensors, heads, maps, dtype)
        _compare_masks(errors, spec, tensors, heads, maps, dtype)
        compare_training(errors, spec, tensors, heads, maps, dtype)
    gradients(errors, tensors, heads, maps, _HTC_NAMES)
    return errors.rows


def _convolution(config: dict) -> nn.Module:
    return nn.Conv2d(config["channels"], config["channels"], 3, padding=1)


@torch.no_grad()
def _compare_masks(
    errors: Errors,
    spec: dict,
    tensors: Tensors,
    heads: HtcHeads,
    maps: list[nn.Parameter],
    dtype: torch.dtype,
) -> None:
    """The semantic branch, and the masks of all heads at the objects."""
    features = heads._features(maps, spec["config"]["strides"])
    if features.semantic:
        errors.out("out.test.semantic_logits", features.semantic[0])
        errors.out("out.test.semantic_feature", features.semantic[1])
    targets = targets_of(spec, tensors, "gt_labels", dtype)
    labels = torch.cat([target.labels for target in targets])
    cuts = heads._mask_cuts(features, [target.boxes for target in targets])
    logits = [of_class(each, labels) for each in heads._all_masks(cuts)]
    for number, own in enumerate(logits):
        errors.out(f"out.test.mask_logits_stage{number}_of_gt_class", own)
    errors.out("out.test.mask_logits_last_stage_of_gt_class", logits[-1])


def many(config: dict) -> int:
    """So many samples that none is left out, a quarter of them for objects."""
    return 8 * (config["proposals"] + max(config["gts"]))


CHECKS = {
    "det_box_coder_giou": check_box_coder,
    "det_soft_nms": check_soft_nms,
    "det_cascade": check_cascade,
    "det_htc": check_htc,
    "det_cascade_detectron2": check_cascade_detectron2,
}
