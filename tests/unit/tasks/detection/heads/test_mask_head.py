from __future__ import annotations

import pytest
import torch
from detection_batches import boxes

from fd_large.tasks.detection.heads.mask_head import cut_masks
from fd_large.tasks.detection.scores.collect import paste


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
