from __future__ import annotations

import pytest
import torch
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET
from fd_large.engine.frozen import Frozen
from fd_large.errors import ShapeError
from fd_large.tasks.distillation.several.mosaic import Mosaic

TILE, PATCH, WIDTH = 16, 4, 5


class Net(nn.Module):
    """Patches of 4 pixels, which see `context` patches around them, after a prefix token."""

    width = WIDTH

    def __init__(self, context: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.around = nn.Conv2d(WIDTH, WIDTH, 2 * context + 1, padding=context)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // PATCH, width // PATCH

    def forward(self, images: torch.Tensor) -> FeatureMap:
        map_ = self.around(self.patches(images))
        tokens = map_.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        return FeatureMap(tokens, (map_.shape[2], map_.shape[3]), 1)


def mosaic(context: int = 0, tiles: int = 2) -> Mosaic:
    return Mosaic(Net(context), IMAGENET, image_size=tiles * TILE, tiles=tiles)


def images(count: int, side: int = TILE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).byte()


@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.parametrize("side", [TILE, 24])
def test_a_local_teacher_gives_the_maps_of_images_one_by_one(tiles, side):
    batch = images(2 * tiles**2, side)
    found = mosaic(tiles=tiles)(batch)
    alone = Frozen(Net(0), IMAGENET, image_size=TILE)(batch)
    assert (found.grid, found.num_prefix_tokens) == (alone.grid, 0)
    torch.testing.assert_close(found.tokens, alone.tokens[:, 1:])


def test_what_sees_its_surroundings_differs_at_the_seams_alone():
    batch = images(4)
    found, alone = mosaic(1)(batch), Frozen(Net(1), IMAGENET)(batch)
    same = (found.tokens - alone.tokens[:, 1:]).abs().amax(-1).view(4, 4, 4) < 1e-5
    assert same[:, 1:-1, 1:-1].all()
    # The first image is at the upper left: its other two sides are seams.
    assert same[0, :-1, :-1].all()
    assert not same[0, -1].any()
    assert not same[0, :, -1].any()


def test_the_last_mosaic_is_filled_with_the_first_images():
    net, batch = mosaic(1), images(6)
    found = net(batch)
    assert len(found.tokens) == 6
    filled = net(torch.cat([batch, batch[:2]]))
    assert torch.equal(found.tokens, filled.tokens[:6])
    # Mosaics do not know of each other: whole ones in another order have the same maps.
    turned = net(torch.cat([batch[4:], batch[:2], batch[:4]]))
    torch.testing.assert_close(turned.tokens[4:], found.tokens[:4])


def test_an_image_alone_depends_on_no_other():
    net, batch = mosaic(1), images(3)
    found = net(batch, alone=True)
    for other in (net(batch[1:2], alone=True), net(batch[1:2].repeat(4, 1, 1, 1))):
        torch.testing.assert_close(found.tokens[1:2], other.tokens[:1])
    assert net(batch[1:2]).grid == (4, 4)


def test_tiles_end_where_tokens_do():
    net = Mosaic(Net(0), IMAGENET, image_size=40, tiles=4)
    with pytest.raises(ShapeError, match=r"4x4 images: .* 10x10 tokens"):
        net.grid(TILE)
