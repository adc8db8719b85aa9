"""From uint8 pixels to what a model was trained on, and to another size."""

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP, normalise


@pytest.mark.parametrize("statistics", [IMAGENET, OPENAI_CLIP])
def test_it_is_torchvisions(statistics):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    found = normalise(images, statistics)
    expected = normalize(images / 255, list(statistics.mean), list(statistics.std))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
