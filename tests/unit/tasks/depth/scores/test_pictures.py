"""An image and its depth side by side."""

import numpy as np
from PIL import Image

from fd_large.tasks.depth.scores.pictures import draw_prediction


def test_image_and_depth_are_as_wide_as_the_image_is_beside_the_bar(tmp_path):
    image = np.full((40, 60, 3), 200, np.uint8)
    draw_prediction(image, np.tile(np.linspace(1, 4, 60), (40, 1)), tmp_path / "depth.png")
    with Image.open(tmp_path / "depth.png") as drawn:
        width, height = drawn.size
        pixels = np.array(drawn.convert("RGB"))
    one = height * 60 // 40
    assert 2 * one < width < 2.5 * one
    assert (pixels[height // 2, : one - 5] == 200).all(), "the image"
    depth = pixels[height // 2, one + 10 : 2 * one - 5].astype(int)
    assert len(np.unique(depth, axis=0)) > 20, "depths of one row have colours of their own"
