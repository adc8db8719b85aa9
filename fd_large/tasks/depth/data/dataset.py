"""Datasets of images and 16-bit depth files: NYUv2 and KITTI (by lists), and plain folders."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.image_header import MAX_PIXELS
from fd_large.errors import DataError
from fd_large.tasks.dense.pairs import Layout, PairedImages, Pairs, pairs_in_folders, read_numbers
from fd_large.tasks.depth.data.lists import DEFAULT_NAMES, default_list, pairs_of_list

log = logging.getLogger(__name__)

LAYOUTS = (
    Layout("images/{split}", "depths/{split}"),
    Layout("{split}/images", "{split}/depths"),
    # JPEGs and the PNGs of their depths side by side.
    Layout("{split}", "{split}"),
)
MODES = ("I", "I;16", "I;16B")
FILE = "a depth file, one number of 16 bits a pixel"


class DepthSet(PairedImages):
    """The images of a split with their depth files; `s.truth(i)` returns the depths of image i.

    Args:
        pairs: The images and their depth files.
        scale: Units of a depth file per metre.
        valid_range: Two depths (near, far) in metres. Depths d with near < d <= far are kept, and
            other depths count as unknown. (0, 0) keeps all depths.
        bottom_crop: Height and width of the part of an image that is used, at the bottom of the
            image and horizontally centred. (0, 0) uses the whole image.
        max_pixels: Largest number of pixels of an image or depth file. Reading a larger file raises
            DataError.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        scale: float,
        valid_range: tuple[float, float],
        bottom_crop: tuple[int, int],
        max_pixels: int,
    ) -> None:
        super().__init__(pairs, max_pixels=max_pixels)
        self._scale, self._bottom_crop, self._valid_range = scale, bottom_crop, valid_range

    def truth(self, index: int) -> NDArray[np.float32]:
        """Reads the depths of the whole image `index`, (H, W) in metres; unknown depths are 0.

        Raises: DataError: if the depth file cannot be read, or is not a 16-bit image.
        """
        numbers = read_numbers(self.truth_file(index), MODES, FILE, max_pixels=self.max_pixels)
        depths = numbers.astype(np.float32) / np.float32(self._scale)
        nearest, farthest = self._valid_range
        if farthest:
            depths[(depths <= nearest) | (depths > farthest)] = 0
        return depths

    def check_range(self, limits: tuple[float, float], where: str) -> None:
        """Reads some of the depth files, and checks that their depths are in the expected unit.

        Args:
            limits: Two depths in metres, between which the median of the known depths must be.
            where: The field that names the dataset, for messages.

        Raises:
            DataError: if a file cannot be used, or if the median of the known depths is not
                strictly between the limits.
        """
        known = np.concatenate([truth[truth > 0] for truth in self.some_truths()])
        low, high = limits
        if not known.size:
            raise DataError(
                f"{where}: no depth in any of the sampled files, such as "
                f"{self.truth_file(0)}; got 0 in every pixel, expected some depths in "
                "task.depth.valid_range. Check the files, or set that range."
            )
        if not low < np.median(known) < high:
            raise DataError(
                f"{where}: depths beyond the limits; got a median of {np.median(known):.4g} m in "
                f"some of the files ({known.min():.4g} to {known.max():.4g} m), as "
                f"{self.truth_file(0)}, expected more than {low} and less than {high} m. Set "
                "--task.depth.depth_scale, --task.depth.max_depth or --task.depth.min_depth."
            )

    def sample(self, index: int) -> tuple[Tensor, NDArray[np.float32]]:
        """Reads image `index`, (3, H, W) uint8, and its depths, (H, W), after the bottom crop.

        Raises:
            DataError: if a file cannot be read, if image and depth file differ in size, or if the
                image is smaller than the bottom crop.
        """
        image, depths = super().sample(index)
        rows, columns = self._bottom_crop
        if not rows:
            return image, depths
        height, width = depths.shape
        if height < rows or width < columns:
            raise DataError(
                f"{self[index]}: too small for task.depth.bottom_crop; got {width} x {height} "
                f"pixels, expected at least {columns} x {rows}. Set --task.depth.bottom_crop 0 0, "
                "or leave the image out."
            )
        left = (width - columns) // 2
        part = np.s_[..., height - rows :, left : left + columns]
        return image[part], depths[part]


def open_depth(
    root: str,
    split: str,
    *,
    list_file: str = "",
    depth_scale: float = 1000.0,
    valid_range: tuple[float, float] = (0.0, 0.0),
    limits: tuple[float, float] = (0.0, math.inf),
    bottom_crop: tuple[int, int] = (0, 0),
    max_pixels: int = MAX_PIXELS,
    where: str = "data.root",
) -> DepthSet:
    """Opens a split of a dataset, and checks some of its depth files by reading them.

    Args:
        root: The dataset's folder. Without a list it must have the folders images/SPLIT and
            depths/SPLIT, or SPLIT/images and SPLIT/depths, or a folder SPLIT of JPEG images and
            PNG depth files with the same stems.
        split: "train" or "val".
        list_file: Path of a list of images and depth files (`lists.py`), as for NYUv2 and KITTI. If
            empty, a list in `root` with a name in `DEFAULT_NAMES` is used; if `root` has no such
            list, the folders are searched.
        depth_scale: Units of a depth file per metre.
        valid_range: Two depths (near, far) in metres. Depths d with near < d <= far are kept, and
            other depths count as unknown. (0, 0) keeps all depths.
        limits: Two depths in metres. The median of the known depths in the checked files must be
            strictly between them.
        bottom_crop: Height and width of the part of an image that is used, at the bottom of the
            image and horizontally centred. (0, 0) uses the whole image.
        max_pixels: Largest number of pixels of an image or depth file. Reading a larger file raises
            DataError.
        where: The field that names the folder, for messages.

    Raises:
        DataError: if there is no such split, an image has no depth file, or one of the files read
            cannot be used.
    """
    field = f"task.depth.{split}_list"
    path = list_file or default_list(root, split)
    if path:
        pairs = pairs_of_list(path, root, where=field, of_root=where)
    else:
        names = " or ".join(DEFAULT_NAMES[split])
        pairs = pairs_in_folders(
            LAYOUTS,
            root,
            split,
            kind="depths",
            where=where,
            otherwise=f'; or a list of lines "IMAGE DEPTH", as for NYUv2 and KITTI: {names} in '
            f"that folder, or another one by --{field}",
        )
    opened = DepthSet(
        pairs,
        scale=depth_scale,
        valid_range=valid_range,
        bottom_crop=bottom_crop,
        max_pixels=max_pixels,
    )
    opened.check_range(limits, where)
    log.info("%s: %s: %d images with depths in %s", where, split, len(opened), root)
    return opened
