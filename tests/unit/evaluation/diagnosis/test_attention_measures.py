"""Figures of hand-made maps against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fd_large.backbones.token_positions import image_positions, window_positions
from fd_large.evaluation.diagnosis.attention_measures import (
    LayerFigures,
    average_map,
    head_distances,
    head_similarity,
    nearest_offset_map,
    prefix_share,
    translation_score,
)

GRID = (3, 4)
N = 12


def identity() -> Tensor:
    return torch.eye(N)


def uniform() -> Tensor:
    return torch.full((N, N), 1 / N)


def one_to_the_right() -> Tensor:
    """Every token looks at its right neighbour, the last of a row at itself."""
    at = torch.arange(N)
    return torch.eye(N)[torch.where(at % 4 == 3, at, at + 1)]


def heads(*maps: Tensor, images: int = 1) -> Tensor:
    """(B, 1, h, N, N)."""
    return torch.stack(maps)[None, None].expand(images, -1, -1, -1, -1)


def test_distances_of_identity_and_one_pixel_shift() -> None:
    found = head_distances(
        heads(identity(), one_to_the_right(), images=2), image_positions(GRID, 0)
    )
    # Three of four tokens of a row look one to the right.
    assert found.tolist() == [[0.0, 0.75]] * 2


def test_distance_of_uniform_attention() -> None:
    found = head_distances(torch.full((1, 1, 1, 4, 4), 0.25), image_positions((2, 2), 0))
    # From a corner of 2 x 2: itself, two neighbours, the opposite corner.
    assert found.item() == pytest.approx((0 + 1 + 1 + math.sqrt(2)) / 4)


def test_prefix_tokens_count_neither_as_queries_nor_as_keys() -> None:
    attention = torch.zeros(1, 1, 1, 5, 5)
    # CLS looks at the far corner; each patch spends .6 on CLS, .3 on itself, .1 to the right.
    attention[..., 0, 4] = 1
    attention[..., 1:, 0] = 0.6
    attention[..., 1:, 1:] = 0.3 * torch.eye(4) + 0.1 * torch.eye(4)[[1, 0, 3, 2]]
    positions = image_positions((2, 2), 1)
    assert head_distances(attention, positions).item() == pytest.approx(0.1 / 0.4)
    assert prefix_share(attention, positions).item() == pytest.approx(0.6)
    average = average_map(attention, positions)
    assert average.shape == (1, 4, 4)
    torch.testing.assert_close(average.sum(-1), torch.ones(1, 4))
    assert average[0, 0, 0].item() == pytest.approx(0.75)


def test_distances_in_shifted_windows_are_of_true_positions() -> None:
    positions = window_positions((4, 4), (2, 2), (1, 1), pad_first=True)
    opposite = torch.eye(4)[[3, 2, 1, 0]].expand(1, 4, 1, 4, 4)
    # The window in the middle: sqrt 2. Two windows of opposite edges: 3 across and 1 along.
    # The window of corners: 3 and 3.
    expected = (math.sqrt(2) + 2 * math.sqrt(10) + math.sqrt(18)) / 4
    assert head_distances(opposite, positions).item() == pytest.approx(expected)


def test_padding_is_left_out() -> None:
    positions = window_positions((3, 2), (2, 2), (0, 0), pad_first=False)
    attention = torch.full((1, 2, 1, 4, 4), 0.25)
    # Six queries: of the whole window (0 + 1 + 1 + sqrt 2) / 4, of the cut one (0 + 1) / 2.
    expected = (4 * (2 + math.sqrt(2)) / 4 + 2 * 0.5) / 6
    assert head_distances(attention, positions).item() == pytest.approx(expected)
    # An average is taken over whole windows alone.
    attention[:, 1] = torch.eye(4)
    assert average_map(attention, positions).tolist() == [[[0.25] * 4] * 4]


def test_likeness_of_heads() -> None:
    positions = image_positions(GRID, 0)

    def found(*maps: Tensor) -> float:
        return head_similarity(heads(*maps), positions).item()

    assert found(identity(), identity()) == pytest.approx(1)
    # <I, U> = N / N, |I| = sqrt N, |U| = 1.
    assert found(identity(), uniform()) == pytest.approx(1 / math.sqrt(N))
    # The last token of each of 3 rows looks at itself: 3 common ones of 12.
    assert found(identity(), one_to_the_right()) == pytest.approx(3 / 12)
    # Three pairs.
    expected = (3 / 12 + 2 / math.sqrt(N)) / 3
    assert found(identity(), one_to_the_right(), uniform()) == pytest.approx(expected)
    assert math.isnan(found(identity()))


def test_heads_that_share_a_sink_may_differ_among_patches() -> None:
    """Nine tenths of all attention go to the class token, the rest as without it."""
    maps = [torch.zeros(N + 1, N + 1) for _ in range(2)]
    for whole, of_patches in zip(maps, (identity(), one_to_the_right()), strict=True):
        whole[:, 0] = 0.9
        whole[1:, 1:] = 0.1 * of_patches
        whole[0, 1:] = 0.1 / N
    both, positions = heads(*maps), image_positions(GRID, 1)
    assert head_similarity(both, positions).item() > 0.98
    among = head_similarity(both, positions, patches_alone=True).item()
    assert among == pytest.approx(3 / 12)


def test_average_over_heads_and_images() -> None:
    layer = LayerFigures("attn", stride=16.0)
    layer.add(heads(identity(), uniform()), image_positions(GRID, 0))
    layer.add(heads(uniform(), uniform(), images=2), image_positions(GRID, 0))
    torch.testing.assert_close(layer.average(), (identity() / 6 + 5 / 6 * uniform()).double())
    figures = layer.figures()
    # Uniform attention on 3 x 4 tokens, and a third of it for the head that was once identity.
    apart = [math.hypot(y1 - y2, x1 - x2) for y1 in range(3) for x1 in range(4)
             for y2 in range(3) for x2 in range(4)]  # fmt: skip
    mean = 16 * sum(apart) / len(apart)
    assert figures["distance_pixels"] == pytest.approx([2 / 3 * mean, mean], rel=1e-5)
    assert figures["head_similarity"] == pytest.approx((1 / math.sqrt(N) + 1 + 1) / 3, rel=1e-5)
    assert figures["prefix_share"] == [0, 0]
    # I / 6 + 5 / 6 U: the diagonal is 1 / 6 over the rest; sqrt(1 / N - 1 / N^2) / 6 over 1 / N.
    assert figures["average_variation"] == pytest.approx(math.sqrt(N - 1) / 6, rel=1e-5)


def offset_map(window: tuple[int, int], seed: int) -> Tensor:
    """The softmax of a random table of offsets."""
    rows, columns = window
    torch.manual_seed(seed)
    table = 2 * torch.randn(2 * rows - 1, 2 * columns - 1)
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
    return table[y[None] - y[:, None] + rows - 1, x[None] - x[:, None] + columns - 1].softmax(-1)


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 6)])
def test_a_map_of_offsets_alone_scores_1(window: tuple[int, int]) -> None:
    average = offset_map(window, 0)
    assert translation_score(average, window) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        nearest_offset_map(average, window), average.double(), atol=1e-6, rtol=0
    )


def test_simple_maps_of_offsets_score_1() -> None:
    for average in (identity(), uniform()):
        assert translation_score(average, GRID) == pytest.approx(1)


def test_a_random_map_scores_nothing() -> None:
    scores = []
    for seed in range(20):
        torch.manual_seed(seed)
        scores.append(translation_score(torch.randn(49, 49).softmax(-1), (7, 7)))
    assert abs(sum(scores) / len(scores)) < 0.02
    assert max(scores) < 0.08


def test_a_map_that_depends_on_the_key_scores_little() -> None:
    torch.manual_seed(0)
    keys = torch.randn(49).softmax(0).expand(49, 49)
    assert translation_score(keys, (7, 7)) < 0.2


def test_a_mixture_lies_between() -> None:
    torch.manual_seed(0)
    noise, offsets = torch.randn(49, 49).softmax(-1), offset_map((7, 7), 0)
    scores = [translation_score(t * noise + (1 - t) * offsets, (7, 7)) for t in (0.2, 0.5, 0.8)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0


def test_one_patch_has_no_score() -> None:
    assert math.isnan(translation_score(torch.ones(1, 1), (1, 1)))
