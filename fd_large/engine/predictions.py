"""Predictions of test images, stored in a run's folder for comparisons by image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fd_large.files import unlinked

FILE = "predictions.npz"


class Predictions(NamedTuple):
    """Predicted and true classes of the test images, in the dataset's order.

    Attributes:
        predicted: (N,) int64, the predicted class of each image.
        labels: (N,) int64, the true class of each image; -1 if the image could not be used.
    """

    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]

    def write(self, folder: Path) -> None:
        """Writes the predictions into the folder of a run."""
        np.savez_compressed(unlinked(folder / FILE), predicted=self.predicted, labels=self.labels)

    @classmethod
    def read(cls, folder: Path) -> Predictions | None:
        """Returns the predictions in the folder of a run, or None if none can be read.

        Earlier versions stored none.
        """
        try:
            with np.load(folder / FILE) as file:
                return cls(file["predicted"], file["labels"])
        except (OSError, BadZipFile, KeyError, ValueError):
            return None
