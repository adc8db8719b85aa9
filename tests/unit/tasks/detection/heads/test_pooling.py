from __future__ import annotations

import torch
from detection_batches import NO_BOXES, boxes

from fd_large.tasks.detection.heads.pooling import pool


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
