"""CKA by minibatches: rotations do not matter, independent features are not alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fd_large.evaluation.diagnosis.cka import Similarity, gram, hsic


def cka(a: Tensor, b: Tensor, batch_size: int) -> float:
    similarity = Similarity()
    for x, y in zip(a.split(batch_size), b.split(batch_size), strict=True):
        similarity.add([gram(x), gram(y)])
    matrix = similarity.matrix()
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(2, dtype=torch.float64))
    return matrix[0, 1].item()


def features(seed: int, images: int = 96, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, width, generator=generator)


def test_a_rotated_scaled_and_shifted_copy_is_the_same() -> None:
    x = features(0)
    rotation = torch.linalg.qr(features(1, 40, 40))[0]
    assert cka(x, 3 * x @ rotation + 5, 16) == pytest.approx(1, abs=1e-6)


def test_another_layout_is_the_same() -> None:
    x = features(0).view(96, 5, 2, 4)
    assert cka(x, x.permute(0, 2, 3, 1), 16) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("width", [4, 40, 4000])
def test_independent_noise_is_not_alike(width: int) -> None:
    # The plain estimate of HSIC gives 0.99 for the widest.
    found = [cka(features(s, 96, width), features(s + 50, 96, width), 16) for s in range(10)]
    assert abs(sum(found) / 10) < 0.08
    assert max(map(abs, found)) < 0.3


def test_a_copy_with_noise_lies_between() -> None:
    x = features(0)
    less, more = (cka(x, x + scale * features(1), 16) for scale in (0.5, 2.0))
    assert 1 > less > more > 0


def test_the_estimate_is_unbiased() -> None:
    # Against the definition: the mean over all quadruples of different images.
    torch.manual_seed(0)
    k, m = (gram(torch.randn(6, 3)) for _ in range(2))
    total = []
    for i in range(6):
        for j in range(6):
            for q in range(6):
                for r in range(6):
                    if len({i, j, q, r}) == 4:
                        total.append(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]))
    assert hsic(k, m).item() == pytest.approx(sum(total).item() / len(total))
