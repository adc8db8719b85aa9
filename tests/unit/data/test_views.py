from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as colours

from fd_large.data.decode import decode
from fd_large.data.folder import ImageFolder
from fd_large.data.random_numbers import uniforms
from fd_large.data.views import (
    NUM_COLOR_DRAWS,
    NUM_DRAWS,
    ViewSettings,
    box_view,
    crop_box,
    jitter_color,
    random_view,
)

NUM = 4000


def view_of(image: torch.Tensor, draws, *, image_size: int, min_crop_scale: float) -> torch.Tensor:
    box = crop_box(*image.shape[-2:], draws, min_crop_scale=min_crop_scale)
    return box_view(image, box, draws, image_size=image_size)


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    grid = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("height", "width"), [(120, 160), (300, 100), (64, 64)])
def test_a_cut_box_is_byols(height, width):
    """Class RandomResizedCrop of SwinTransformer/Feature-Distillation's data_linear.py."""
    for row in uniforms(0, 0, np.arange(200), "view", NUM_DRAWS).tolist():
        _, at_top, at_left, share, aspect, *_ = row
        area = (0.08 + 0.92 * share) * height * width
        ratio = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * aspect))
        wide = min(round(np.sqrt(area * ratio)), width)
        high = min(round(np.sqrt(area / ratio)), height)
        place = int(at_top * (height - high + 1)), int(at_left * (width - wide + 1))
        box = crop_box(height, width, row, min_crop_scale=0.08, cuts_boxes=True)
        assert box == (*place, high, wide)


@pytest.mark.parametrize(
    ("height", "width", "min_scale"), [(120, 160, 0.08), (300, 100, 0.08), (64, 64, 0.5)]
)
def test_boxes_have_the_distribution_of_torchvisions(height, width, min_scale):
    draws = uniforms(0, 0, np.arange(NUM), "view", NUM_DRAWS).tolist()
    ours = np.array([crop_box(height, width, row, min_crop_scale=min_scale) for row in draws])
    torch.manual_seed(0)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    scale, ratio = [min_scale, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(NUM)])
    limit = 1.95 * np.sqrt(2 / NUM)  # exceeded by chance once in a thousand
    for of in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 3] / box[:, 2],  # aspect
        lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),  # place
        lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),
    ):
        assert largest_gap(of(ours), of(theirs)) < limit


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (1, 1), (1, 9), (31, 33)])
@pytest.mark.parametrize("min_scale", [0.08, 1.0])
def test_boxes_lie_inside_pictures_of_any_shape(height, width, min_scale):
    for row in uniforms(1, 0, np.arange(300), "view", NUM_DRAWS).tolist():
        top, left, box_height, box_width = crop_box(height, width, row, min_crop_scale=min_scale)
        assert top >= 0
        assert left >= 0
        assert 1 <= box_height <= height - top
        assert 1 <= box_width <= width - left


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20)])
def test_where_no_try_fits_the_middle_is_taken_as_in_torchvision(height, width):
    image = torch.empty(3, height, width, dtype=torch.uint8)
    expected = RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    assert crop_box(height, width, [0.5] * NUM_DRAWS, min_crop_scale=1.0) == tuple(expected)


@pytest.mark.parametrize("size", [32, 96])
def test_a_view_has_the_pixels_of_torchvisions_crop(photograph, size):
    """Those of its Pillow path but for ties; its float path rounds once, the others twice."""
    pixels = photograph(90, 120)
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
    for row in uniforms(2, 0, np.arange(20), "view", NUM_DRAWS).tolist():
        view = view_of(image, row, image_size=size, min_crop_scale=0.2)
        assert view.shape == (3, size, size)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        box = crop_box(90, 120, row, min_crop_scale=0.2)
        arguments = (*box, [size, size], InterpolationMode.BILINEAR)
        in_floats = F.resized_crop(image, *arguments, antialias=True)
        by_pillow = F.pil_to_tensor(F.resized_crop(Image.fromarray(pixels), *arguments))
        if row[0] < 0.5:
            in_floats, by_pillow = in_floats.flip(-1), by_pillow.flip(-1)
        for expected, most in ((by_pillow, 0.05), (in_floats, 0.5)):
            difference = (view.int() - expected.int()).abs()
            assert difference.max() <= 1
            assert difference.double().mean() < most


def test_memory_order_of_the_picture_does_not_matter(photograph):
    interleaved = torch.from_numpy(photograph(50, 70)).permute(2, 0, 1)
    for row in uniforms(3, 0, np.arange(8), "view", NUM_DRAWS).tolist():
        a, b = (
            view_of(image, row, image_size=32, min_crop_scale=0.2)
            for image in (interleaved, interleaved.contiguous())
        )
        assert torch.equal(a, b)


def test_half_of_the_views_are_flipped():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[..., 4:] = 255
    rows = uniforms(4, 0, np.arange(1000), "view", NUM_DRAWS).tolist()
    views = [view_of(image, row, image_size=8, min_crop_scale=1.0) for row in rows]
    flipped = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
    assert abs(flipped - 500) < 4 * np.sqrt(250)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_read_from_a_source_is_that_of_the_whole_image(picture_folder, interpolation):
    source = ImageFolder(picture_folder)
    settings = ViewSettings(32, 0.2, interpolation=interpolation)
    for index, row in enumerate(uniforms(5, 0, np.arange(len(source)), "view", NUM_DRAWS).tolist()):
        image = decode(source.read(index), source[index])
        box = crop_box(*image.shape[-2:], row, min_crop_scale=0.2)
        whole = box_view(image, box, row, image_size=32, interpolation=interpolation)
        assert torch.equal(random_view(source, index, row, settings), whole)


MIDDLE = 0.5  # of a draw: no change


@pytest.fixture(scope="module")
def image(photograph):
    return torch.from_numpy(photograph(24, 32)).permute(2, 0, 1).contiguous()


def jitter(image, draws, strength=0.4, grayscale_probability=0.0):
    return jitter_color(
        image, draws, strength=strength, grayscale_probability=grayscale_probability
    )


@pytest.mark.parametrize(
    ("number", "operation"),
    [
        (0, lambda x: colours.adjust_brightness(x, 1.2)),
        (1, lambda x: colours.adjust_contrast(x, 1.2)),
        (2, lambda x: colours.adjust_saturation(x, 1.2)),
        (3, lambda x: colours.adjust_hue(x, 0.05)),
    ],
)
def test_each_draw_drives_torchvisions_operation(image, number, operation):
    draws = [MIDDLE] * 4 + [0.0, 0.0]
    unchanged = jitter(image, draws)
    draws[number] = 0.75  # half way to the upper end
    difference = (jitter(image, draws).int() - operation(image).int()).abs()
    assert difference.max() <= 2  # hue's way to HSV and back rounds
    assert not torch.equal(jitter(image, draws), unchanged)


def test_the_order_is_drawn(image):
    results = {
        jitter(image, [0.9, 0.1, 0.9, 0.9, order, 0.9]).numpy().tobytes()
        for order in (np.arange(24) + 0.5) / 24
    }
    assert len(results) > 4


def test_the_spread_is_that_of_torchvisions_jitter(image):
    rows = uniforms(0, 0, np.arange(700), "color", NUM_COLOR_DRAWS).tolist()
    ours = np.array([jitter(image, row).double().mean() for row in rows])
    torch.manual_seed(0)
    theirs_of = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = np.array([theirs_of(image).double().mean() for _ in range(700)])
    assert abs(ours.mean() - theirs.mean()) < 4 * np.hypot(ours.std(), theirs.std()) / 700**0.5
    assert abs(ours.std() / theirs.std() - 1) < 0.1


def test_gray_views_come_with_their_probability(image):
    rows = uniforms(1, 0, np.arange(1000), "color", NUM_COLOR_DRAWS).tolist()
    views = [jitter(image, row, strength=0.0, grayscale_probability=0.2) for row in rows]
    gray = sum(bool((view == view[:1]).all()) for view in views)
    assert abs(gray - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5
    assert sum(torch.equal(view, image) for view in views) == 1000 - gray


def test_nothing_is_changed_at_strength_zero(image):
    assert jitter(image, [0.9] * NUM_COLOR_DRAWS, strength=0.0) is image
