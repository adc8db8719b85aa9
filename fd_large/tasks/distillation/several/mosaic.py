"""Several images tiled into one input of a teacher with a fixed image size.

A teacher such as SAM takes images of 1,024 px, while the student's images have 256 px. Here k x k
images are tiled into one input of the teacher, whose map is then cut into the maps of the images.
Enlarging each image to the teacher's size would cost k^2 times as much computation, but an enlarged
image shows no more detail.

Source: RADIO's mosaics for SAM, described by its authors on GitHub (NVlabs/RADIO, #175); the code
is not published.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.resize import resize_images
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.engine.frozen import Frozen
from fd_large.errors import ShapeError
from fd_large.recipes.fields import require
from fd_large.tasks.distillation.task import Maps


class Mosaic(Frozen):
    """A frozen backbone that runs on mosaics of k x k images, and returns the map of each image.

    Consecutive images fill a mosaic row by row. An incomplete last mosaic is filled up with the
    first images of the batch. Prefix tokens, which belong to no image, are left out.

    Args:
        net, statistics: See `Frozen`.
        image_size: Side of the whole mosaic, in pixels.
        tiles: Images along a side of a mosaic, k.
    """

    def __init__(
        self, net: nn.Module, statistics: Statistics, *, image_size: int, tiles: int
    ) -> None:
        super().__init__(net, statistics, image_size=image_size)
        self.tiles = tiles

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the rows and columns of an image's map, which do not depend on the image's side.

        Args:
            image_size: Side of the images, in pixels; not used.

        Raises: ShapeError: if the edges of the images are not edges of the mosaic's patches.
        """
        rows, columns = self.net.grid(self.image_size, self.image_size)
        if self.image_size % self.tiles or rows % self.tiles or columns % self.tiles:
            raise ShapeError(
                f"a mosaic of {self.tiles}x{self.tiles} images: the images do not end at borders "
                f"of tokens; got a mosaic of {self.image_size}x{self.image_size} pixels and "
                f"{rows}x{columns} tokens, expected multiples of {self.tiles} for both. Set "
                "another teachers.NAME.teacher_image_size or teachers.NAME.mosaic."
            )
        return rows // self.tiles, columns // self.tiles

    def forward(self, images: Tensor, *, alone: bool = False) -> FeatureMap:
        """Returns the map of uint8 images (B, 3, H, W), without gradient.

        Args:
            images: The images.
            alone: Whether a mosaic holds k x k copies of a single image, so that the map of an
                image depends on no other image.
        """
        k = self.tiles
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            side = self.image_size // k
            if side != pixels.shape[-1]:
                pixels = resize_images(pixels, (side, side))
            if alone:
                pixels = pixels.repeat_interleave(k * k, dim=0)
            count = len(pixels)
            places = torch.arange(count + -count % (k * k), device=pixels.device) % count
            mosaics = rearrange(pixels[places], "(b i j) c h w -> b c (i h) (j w)", i=k, j=k)
            map_ = self.net(mosaics.to(next(self.net.parameters()).dtype))
            rows, columns = self.grid(images.shape[-1])
            tokens = rearrange(
                map_.tokens[:, map_.num_prefix_tokens :],
                "b (i h j w) c -> (b i j) (h w) c",
                i=k,
                j=k,
                h=rows,
                w=columns,
            )
            return FeatureMap(tokens[: count : k * k if alone else 1], (rows, columns), 0)


class AloneInEvaluation:
    """Wraps `Distillation.teachers`, to fill each mosaic with copies of one image in evaluation.

    Therefore metrics do not depend on which images share a mosaic.

    Args:
        teachers: The wrapped callable, as `Teachers`.
        names: Names of the teachers with mosaics.
    """

    def __init__(self, teachers: Any, names: Collection[str]) -> None:
        self._teachers, self.by_name, self._names = teachers, teachers.by_name, tuple(names)

    def __call__(self, images: Tensor, given_maps: Maps, training: bool) -> Maps:
        """Returns `given_maps`, and by name the maps of teachers that `given_maps` does not have.

        Args:
            images: (B, 3, H, W) uint8.
            given_maps: Maps by the teacher's name, and other targets of the batch.
            training: Whether a mosaic holds several images; if False, it holds copies of one image.
        """
        alone = [] if training else [name for name in self._names if name not in given_maps]
        maps = {name: self.by_name[name](images, alone=True) for name in alone}
        return self._teachers(images, {**given_maps, **maps}, training)


def check_mosaics_full(images: int, micro_batch_size: int | str) -> None:
    """Raises ConfigError if micro-batches leave a mosaic incomplete.

    The map of an image depends on the other images of the mosaic. If all mosaics are full, the same
    images share a mosaic for any number of ranks.

    Args:
        images: Smallest number of images that fills the mosaics of every teacher.
        micro_batch_size: Number of images of a micro-batch, or "auto", which may become any number.
    """
    require(
        images == 1 or (not isinstance(micro_batch_size, str) and micro_batch_size % images == 0),
        "batch.micro_batch_size: mosaics that are not full",
        f"{micro_batch_size} images with mosaics of {images}",
        f"a multiple of {images}",
        f"Set --batch.micro_batch_size {images}",
    )
