"""Scores the model of a stored depth run, or applies it to the user's images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fd_large.checkpoint.read import Reader
from fd_large.files import unlinked
from fd_large.tasks.dense.stored import Seen, StoredDense, predict_files
from fd_large.tasks.depth.data.dataset import DepthSet
from fd_large.tasks.depth.scores.evaluation import Outcome
from fd_large.tasks.depth.scores.pictures import draw_prediction
from fd_large.tasks.depth.scores.tables import numbers_table
from fd_large.tasks.stored_run import Predicted
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import without_folders


class StoredDepth(StoredDense):
    """A stored depth run, which commands can score, and use on images."""

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns the model card's title, introduction and tag for a backbone trained on depth.

        Args:
            manifest: The manifest of the exported checkpoint.
            to: The library or format of the export, a value of the flag `--to`.
        """
        name = without_folders(self.run.data.root)
        return replace(
            super().learned(manifest, to),
            title=f"trained to estimate depth on {name}",
            intro="An image backbone that was trained to give the depth of each pixel; the head "
            f"is left out.{self.without_norm()}",
            tag="depth-estimation-backbone",
        )

    def tables(self, outcome: Outcome, images: DepthSet) -> Sequence[Any]:
        """Returns a list of one item, the table of the nine scores.

        Args:
            outcome: The result of `DepthJob.measure`.
            images: Not used.
        """
        return [numbers_table(outcome)]

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """Draws the predicted depths beside each image, and writes them in metres to .npy files.

        Args:
            reader: A checkpoint of the run.
            images: Paths of image files.
            folder: Folder of the results.
            least_score: Not used, since these predictions have no scores.
        """
        model = self.job.model_to_test(self.task(reader).predict, 1)

        def see(image: Tensor, stem: str) -> Seen:
            size = (image.shape[-2], image.shape[-1])
            views = [view.image(image) for view in model.views.views(*size)]
            depth = model.predict(views, size).cpu().numpy()
            drawn, metres = folder / f"{stem}.png", folder / f"{stem}_depth.npy"
            draw_prediction(image.permute(1, 2, 0).numpy(), depth, drawn)
            np.save(unlinked(metres), depth)
            nearest, median, farthest = (float(x) for x in np.quantile(depth, (0, 0.5, 1)))
            entry = {
                "depth": metres.name,
                "nearest": nearest,
                "median": median,
                "farthest": farthest,
            }
            return entry, f"{nearest:.2f} to {farthest:.2f} m, median {median:.2f} m", drawn

        return predict_files(see, images, folder, max_pixels=self.run.data.max_pixels)
