"""Centre crops are torchvision's, for images of any shape."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from fd_large.data.centre_crops import central_view


@pytest.mark.parametrize("side", [32, 56])
@pytest.mark.parametrize("shape", [(50, 50), (41, 97), (97, 41), (300, 20)])
def test_the_middle_of_an_image_whose_short_side_is_256_to_224(photograph, shape, side):
    image = torch.from_numpy(photograph(*shape)).permute(2, 0, 1)
    found = central_view(image, side)
    short = int(256 / 224 * side)
    steps = [Resize(short, InterpolationMode.BICUBIC, antialias=True), CenterCrop(side)]
    expected = Compose(steps)(image)
    assert found.shape == (3, side, side)
    assert found.is_contiguous()
    # Rounding of the last step alone.
    assert (found.int() - expected.int()).abs().max() <= 1
