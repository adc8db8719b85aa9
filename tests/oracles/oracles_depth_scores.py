"""Checks of oracle files of the test of depth: scores, mirrored images and shifted squares."""

from __future__ import annotations

import re

import numpy as np
import torch
from oracles_models import Row, Tensors, max_relative
from torch import Tensor

from fd_large.tasks.depth.data.views import TestViews
from fd_large.tasks.depth.scores.evaluation import Model
from fd_large.tasks.depth.scores.metrics import (
    NAMES,
    Scores,
    crop_of,
    finite_depths,
    image_scores,
    scored_pixels,
)

DEFAULT_LIMITS = (0.001, 10.0)
# Rounding of the stored scores, which are float64.
SCORE_TOLERANCE = 1e-9


def check_metrics(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The scored pixels and nine scores of each image, and the means; in float64 as ever."""
    limits, rows, tables, pixels = _limits(spec), [], [], []
    scale = spec["args"].get("depth_scale", 1000)
    for i in range(sum(name.startswith("gt_mm.") for name in tensors)):
        truth, predicted = (tensors[f"{name}.{i}"].double().numpy() / scale for name in _STORED)
        inside = scored_pixels(truth, limits, _part(spec["args"], truth.shape))
        pixels.append(int(inside.sum()))
        tables.append(image_scores(finite_depths(predicted, limits)[inside], truth[inside]))
        expected = spec["per_image_float64"][i]
        rows += _compared(f"image {i}", dict(zip(NAMES, tables[-1], strict=True)), expected)
    wrong = sum(a != b for a, b in zip(pixels, spec["valid_pixels"], strict=True))
    means = Scores(np.array(tables), np.array(pixels)).numbers()
    return [
        Row("scored pixels", float(wrong), 0.0),
        *rows,
        *_compared("mean", means, spec["mean_float64"]),
    ]


def check_tta(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Depths of a toy network by mirrored images and shifted squares, and their scores."""
    pattern = r"depth = (\S+) \+ (\S+) \* mean over channels \+ y / (\S+) \+ x \* x / ([\d.]+)"
    found = re.match(pattern, spec["toy_network"])
    assert found, spec["toy_network"]
    constant, factor, down, across = map(float, found.groups())

    def depths(crops: Tensor) -> Tensor:
        height, width = crops.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return constant + factor * crops.mean(1) + y.to(dtype) / down + (x * x).to(dtype) / across

    limits, rows = _limits(spec), []
    for i, case in enumerate(spec["config"]["cases"]):
        image, truth = tensors[f"input.{i}"].to(dtype), tensors[f"depth.{i}"][0].numpy()
        squares = case["shift_size"] if case["shift"] else 0
        views = TestViews(min(case["image"]), squares, case["flip"])
        label, tolerance = f"out.depth.{i}", spec["suggested_tolerance_max_rel"]
        expected = tensors[label]
        for at_once in (1, 3):
            model = Model(depths, views, at_once)
            got = model.of_squares(image)[0] if squares else model.of_view(image)[0]
            nowhere = expected.isnan()
            wrong = (got.isnan() != nowhere).sum().item()
            rows.append(Row(f"{label}, in no square, {at_once} at once", float(wrong), 0.0))
            error = max_relative(got.masked_fill(nowhere, 0), expected.masked_fill(nowhere, 0))
            rows.append(Row(f"{label}, {at_once} at once", error, tolerance))
            whole = model.of_view(image)[0]
            rest = (whole.masked_fill(nowhere, 0) - got.masked_fill(nowhere, 0)).abs().max()
            rows.append(Row(f"{label}, beside the rest", rest.item(), 0.0))
            rows.append(Row(f"{label}, the rest", float(whole.isnan().sum()), 0.0))
        inside = scored_pixels(truth, limits, crop_of("none", *truth.shape))
        scores = image_scores(finite_depths(got.numpy(), limits)[inside], truth[inside])
        named = dict(zip(NAMES, scores, strict=True))
        rows += _compared(f"scores {i}", named, spec["scores_float64"][str(i)], tolerance)
    return rows


_STORED = ("gt_mm", "pred_mm")


def _limits(spec: dict) -> tuple[float, float]:
    given = spec.get("args", {})
    low, high = DEFAULT_LIMITS
    return given.get("min_depth_eval", low), given.get("max_depth_eval", high)


def _part(given: dict, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns that are scored, as "rows 45..470, columns 41..600", or by a name."""
    crop = str(given.get("crop") or "none")
    numbers = [int(number) for number in re.findall(r"\d+", crop)]
    if len(numbers) == 4:
        top, bottom, left, right = numbers
        return slice(top, bottom + 1), slice(left, right + 1)
    named = {"garg": "kitti_garg", "eigen": "kitti_eigen", "nyu": "nyu"}
    name = next((ours for theirs, ours in named.items() if theirs in crop), "none")
    return crop_of(name, *shape)


def _compared(
    label: str,
    got: dict[str, float],
    expected: dict[str, float],
    tolerance: float = SCORE_TOLERANCE,
) -> list[Row]:
    return [
        Row(f"{label}, {name}", abs(got[name] - value) / max(abs(value), 1e-12), tolerance)
        for name, value in expected.items()
    ]
