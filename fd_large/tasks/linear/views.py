"""Labelled images to batches that hold whole groups, for the statistics of the batch norm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fd_large.data.loader import Batch
from fd_large.tasks.classification.views import LabelledViews


@dataclass(frozen=True)
class GroupedBatches(Dataset):
    """Positions of a micro batch to a `Batch`; runs in the workers.

    Its images are those of all groups that the positions touch, (M, 3, S, S) uint8, one group after
    the other: where a micro batch ends inside a group, two ranks or micro batches load the rest.

    Attributes:
        views: Loads the views.
        group: Images of a group; positions k*group to (k+1)*group - 1 are one.
    """

    views: LabelledViews
    group: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the groups."""
        starts = np.unique(positions // self.group) * self.group
        every = (starts[:, None] + np.arange(self.group)).ravel()
        loaded = self.views.load(every)
        places = torch.from_numpy(np.searchsorted(every, positions))
        return Batch(
            loaded.images,
            self.views.epoch,
            torch.from_numpy(positions),
            loaded.indices[places],
            sum((loaded.bad[place] for place in places.tolist()), ()),
            {"labels": loaded.labels[places], "places": places},
        )
