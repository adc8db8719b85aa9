"""Checks of oracle files of detection at several scales: three ways to merge what views show."""

from __future__ import annotations

import torch
from oracles_models import Row, Tensors, max_relative
from torch import Tensor

from fd_large.tasks.detection.heads.roi_heads import Candidates
from fd_large.tasks.detection.heads.selection import Chosen, Selection
from fd_large.tasks.detection.scores.views import ShownView, TestViews, merged, unmirrored


def _view(size: list[int], original: list[int], flipped: bool, areas: str = "") -> ShownView:
    sizes = torch.tensor([size]), torch.tensor([original])
    return ShownView(torch.zeros(0), *sizes, flipped, areas)


def _chosen(chosen: Chosen) -> Tensor:
    return torch.cat([chosen.boxes, chosen.scores[:, None]], dim=1)


def check_union(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The detections of all views, chosen among once more. The files are float32."""
    config, rows = spec["config"], []
    views = [
        _view(config["ori_shape"], config["ori_shape"], flipped) for _, flipped in config["views"]
    ]
    boxes = torch.cat([v.to_original(tensors[f"boxes.{i}"], 0) for i, v in enumerate(views)])
    scores = torch.cat([tensors[f"scores.{i}"] for i in range(len(views))])
    labels = torch.cat([tensors[f"labels.{i}"] for i in range(len(views))]).long()
    for label, nms in (("nms", "hard"), ("soft_nms", "linear")):
        rule = Selection(nms=nms, at_most=config["max_per_img"])
        chosen = rule.of_boxes(boxes, scores, labels)
        for name, got in chosen._asdict().items():
            expected = tensors[f"out.{label}.{name}"]
            rows.append(
                Row(
                    f"{label}.{name}",
                    max_relative(got.to(expected.dtype), expected),
                    spec["suggested_tolerance_max_rel"],
                )
            )
    return rows


def check_views(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The average over shared proposals, and the boxes of all views by areas; float32."""
    config, tolerance, rows = spec["config"], spec["suggested_tolerance_max_rel"], []
    nms = spec["soft_nms"]
    areas = ["".join(ranges) for ranges in config["scale_ranges"]]
    shown = [
        _view(view["img_shape"], config["ori_shape"], view["flip"], areas[i // 2])
        for i, view in enumerate(spec["views"])
    ]

    def chosen(kind: str, merge: str, at_most: int) -> Chosen:
        rule = Selection(
            nms=nms["method"], iou=nms["iou"], least_score=nms["score_thr"], at_most=at_most
        )
        found = [
            (
                view,
                Candidates(
                    tensors[f"{kind}.boxes.{i}"][:, None], tensors[f"{kind}.scores.{i}"][:, :-1]
                ),
            )
            for i, view in enumerate(shown)
        ]
        return merged(found, 0, TestViews(0, 0, merge=merge), rule)

    def add(label: str, got: Tensor) -> None:
        expected = tensors[label]
        error = max_relative(got, expected) if got.shape == expected.shape else float("inf")
        rows.append(Row(label, error, tolerance))

    average = chosen("average", "average", config["max_average"])
    add("out.average.detections", _chosen(average))
    add("out.average.labels", average.labels.int())
    masks = [
        unmirrored(tensors[f"average.masks.{i}"], view.mirrored) for i, view in enumerate(shown)
    ]
    add("out.average.masks", torch.stack(masks).mean(0))
    vote = chosen("vote", "areas", config["max_vote"])
    for label in range(config["classes"]):
        add(f"out.vote.class{label}", _chosen(vote)[vote.labels == label])
    return rows


CHECKS = {"det_tta_merge": check_union, "det_tta_views": check_views}
