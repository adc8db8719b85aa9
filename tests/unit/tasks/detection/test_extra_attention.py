from __future__ import annotations

import torch

from fd_large.tasks.detection.extra_attention import ExtraAttention


def test_every_place_sees_all_of_its_image_and_nothing_beyond():
    torch.manual_seed(0)
    layer = ExtraAttention(8)
    x = torch.randn(2, 3, 4, 8)
    sizes = torch.tensor([[96, 128], [64, 65]])
    whole = layer(x, sizes, 32.0)
    assert whole.shape == x.shape
    # Two rows and three columns of the second image have a pixel of it.
    alone = layer(x[1:, :2, :3], sizes[1:], 32.0)
    torch.testing.assert_close(whole[1:, :2, :3], alone)
    changed = x.clone()
    changed[0, 2, 3] *= -3
    assert (layer(changed, sizes, 32.0)[0] - whole[0]).abs().amax(dim=2).min() > 0
    assert layer(x, torch.zeros_like(sizes), 32.0).isfinite().all()
