"""Images of another size: torchvision's, and in float32 whatever they are stored in."""

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from fd_large.backbones.resize import resize_images

IMAGES = torch.rand(2, 3, 20, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(10, 7), (9, 13), (40, 28), (20, 14)])
@pytest.mark.parametrize("antialias", [True, False])
def test_it_is_torchvisions(size, antialias):
    found = resize_images(IMAGES, size, antialias=antialias)
    torch.testing.assert_close(found, resize(IMAGES, list(size), antialias=antialias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_are_no_narrower_than_float32(dtype):
    found = resize_images(IMAGES.to(dtype), (7, 5))
    assert found.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(found, resize_images(IMAGES.to(dtype).to(wide), (7, 5)).to(dtype))
