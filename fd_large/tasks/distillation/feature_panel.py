"""The arrays of the feature panel: maps of a few held-out images, before and after training.

Written during the run as pictures/features_before.npz and features_after.npz, so that the report
needs neither the models nor torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy

from fd_large.files import replacing
from fd_large.ranks import distributed
from fd_large.recipes.file_names import PICTURES
from fd_large.runtime.hooks import Hook, Setting
from fd_large.runtime.run_folder import written_or_logged


class FeaturePanel(Hook):
    """Writes on rank 0 what the engine computes for the panel."""

    def on_start(self, setting: Setting) -> None:
        """Notes the run."""
        self._setting = setting

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Writes the panel as it is after `index` steps; 0: before training.

        Args:
            index: Finished steps.
            panel: images (n, S, S, 3) uint8; teacher (n, h, w, C) float32, normalised; student of
                the same shape and type, projected; of several teachers teacher_NAME and
                student_NAME. Only rank 0's is used.
        """
        if distributed.is_main() and self._setting.owned():
            name = f"features_{'after' if index else 'before'}.npz"
            write_panel(self._setting.folder / PICTURES / name, index, panel)


def write_panel(path: Path, index: int, panel: dict[str, numpy.ndarray]) -> None:
    """Writes a panel aside and renames it; the number of steps goes with it as `update`."""
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
