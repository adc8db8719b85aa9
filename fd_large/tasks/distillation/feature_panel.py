"""The feature panel, which shows the maps of a few held-out images before and after training.

The run writes the panel's arrays as pictures/features_before.npz and pictures/features_after.npz,
so that the report needs neither the models nor torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from einops import rearrange
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.files import replacing
from fd_large.ranks import distributed
from fd_large.recipes.file_names import PICTURES
from fd_large.runtime.hooks import Hook, Setting
from fd_large.runtime.run_folder import written_or_logged
from fd_large.tasks.distillation.alignment import Grid, resized
from fd_large.tasks.distillation.section import MAP
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

PANEL_IMAGES = 4
PANEL_CANDIDATES = 16
"""Number of views from which `PANEL_IMAGES` are chosen, as a view may show nothing but sky."""


class FeaturePanel(Hook):
    """Hook that writes the feature panel before and after training, on rank 0."""

    def on_start(self, setting: Setting) -> None:
        """Stores the run's setting, which has the run's folder."""
        self._setting = setting

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Writes the panel on rank 0, if this launch of the run still owns the run's folder.

        Args:
            index: Number of finished steps. The file is pictures/features_before.npz for 0 and
                pictures/features_after.npz for any other number.
            panel: The result of `feature_panel` as arrays.
        """
        if distributed.is_main() and self._setting.owned():
            name = f"features_{'after' if index else 'before'}.npz"
            write_panel(self._setting.folder / PICTURES / name, index, panel)


def write_panel(path: Path, index: int, panel: dict[str, numpy.ndarray]) -> None:
    """Writes a panel as an .npz file, atomically.

    The file also has an entry `update`, the number of finished steps.

    Args:
        path: The file.
        index: Number of finished steps.
        panel: The result of `feature_panel` as arrays.
    """
    images, maps = panel["images"], {n: m for n, m in panel.items() if n != "images"}
    assert images.dtype == numpy.uint8
    assert images.shape[-1] == 3
    for name, values in maps.items():
        assert len(values) == len(images)
        teacher = "teacher" + name.removeprefix("student") if name.startswith("student") else name
        assert values.shape == maps[teacher].shape
    with written_or_logged(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, aside.open("wb") as file:
            numpy.savez_compressed(
                file,
                images=images,
                update=numpy.int64(index),
                **{name: values.astype(numpy.float32) for name, values in maps.items()},
            )


def feature_panel(
    task: Distillation, forward: Callable[..., Any], images: Tensor, given_maps: Any = None
) -> dict[str, Tensor]:
    """Computes the maps of a few images, without gradient.

    Args:
        task: The task, in evaluation mode.
        forward: Runs the task's forward, through its engine.
        images: (n, 3, S, S) uint8, on the device.
        given_maps: See `Distillation.learnt`.

    Returns: tensors in host memory, by name: "images" is (n, S, S, 3) uint8. "teacher" is the
        teacher's normalised map and "student" the student's projected map, (n, h, w, C) float32
        each, with h x w patches. In a run with several teachers the names of a teacher's two maps
        are "teacher_NAME" and "student_NAME"; a teacher whose map is not learnt, but only its
        summary, is left out.
    """
    student_tokens: dict[str, Tensor] = {}
    shown = [target for target in task.targets if target.kind == MAP]

    def note(label: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Tensor | FeatureMap) -> None:
            tokens = output.tokens if isinstance(output, FeatureMap) else output
            student_tokens[label] = tokens.detach().float().cpu()

        return hook

    handles = [target.head.register_forward_hook(note(target.label)) for target in shown]
    with torch.no_grad():
        prepared = task.prepare(images, given_maps, None)
        forward(**prepared)
        taught = references(task, **prepared)
    for handle in handles:
        handle.remove()

    def as_map(tokens: Tensor, grid: Grid) -> Tensor:
        h, w = grid
        return rearrange(tokens[:, tokens.shape[1] - h * w :], "n (h w) c -> n h w c", h=h, w=w)

    student_grid = task.student.grid(*images.shape[-2:])
    maps = {"images": rearrange(images, "n c h w -> n h w c").cpu()}
    for target, reference in zip(task.targets, taught, strict=True):
        if target.kind == MAP:
            end = f"_{target.label}" if target.label else ""
            grid, _ = target.given(student_grid, 0)
            places = target.places(student_grid, prepared["maps"][target.teacher].grid)
            maps[f"teacher{end}"] = as_map(reference.cpu(), places)
            tokens = as_map(student_tokens[target.label], grid).flatten(1, 2)
            projected = resized(FeatureMap(tokens, grid, 0), places, antialias=False)
            maps[f"student{end}"] = as_map(projected.tokens, places)
    return maps


def most_varied(views: Sequence[Tensor], names: Sequence[str]) -> list[int]:
    """Returns the sorted indices of the `PANEL_IMAGES` views whose pixels vary most.

    The measure is the variance of each channel over the pixels, summed over the channels. The
    choice depends only on pixels and names, so that a resumed run shows the same views. Two views
    of the same image are chosen only if there are too few images.

    Args:
        views: (3, S, S) uint8 each.
        names: Name of the image from which each view is cut.
    """
    spread = torch.stack([view.float().flatten(1).var(1).sum() for view in views])
    turns, taken = {}, Counter[str]()
    for view in spread.argsort(descending=True, stable=True).tolist():
        turns[view] = taken[names[view]]
        taken[names[view]] += 1
    return sorted(sorted(turns, key=turns.__getitem__)[:PANEL_IMAGES])
