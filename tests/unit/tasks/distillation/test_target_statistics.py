"""Statistics of a teacher's channels: measured in parts, kept in a file, refused where they lie."""

from __future__ import annotations

import pytest
import torch

from fd_large.errors import ConfigError
from fd_large.tasks.distillation.normalisers import check_normaliser, make_normaliser
from fd_large.tasks.distillation.target_statistics import (
    hadamard,
    moments,
    orthogonal,
    read,
    require_same,
    statistics_of,
    write,
)

FACTS = {"teacher_hash": "a", "grid": [2, 2]}


def targets() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return torch.randn(9, 4, 12, generator=generator) @ mixing + 50


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "teacher.safetensors"
    write(path, statistics_of(*moments([(targets(), 1)], lambda sums: sums), FACTS))
    return str(path)


def test_parts_and_ranks_give_what_the_whole_gives():
    rows = targets().flatten(0, 1).double()
    # Two ranks, with other micro batches; the second is padded.
    split = [[(targets()[:5], 1)], [(targets()[5:7], 1), (targets()[7:], 1), (targets()[:1], 0)]]
    sums: list[torch.Tensor] = []
    for parts in split:
        moments(parts, lambda own: (sums.append(own), own)[1])
    mean, covariance = moments(split[0], lambda own: sum(sums))
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance, rows.T.cov(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["standardise", "phi_s"])
def test_every_channel_gets_mean_0_and_variance_1(name, path):
    normaliser = make_normaliser(name, eps=1e-5, statistics=path)
    check_normaliser(normaliser, name)
    rows = normaliser(targets().to(torch.bfloat16).float()).flatten(0, 1)
    assert rows.dtype == torch.float32
    rows = normaliser(targets()).flatten(0, 1)
    assert rows.mean(0).abs().max() < 1e-4
    assert (rows.var(0) - 1).abs().max() < 1e-4
    with torch.device("meta"):
        assert make_normaliser(name, eps=1e-5, statistics=path)(torch.empty(2, 3, 12)).is_meta


def test_phi_s_keeps_angles(path):
    y = make_normaliser("phi_s", eps=1e-5, statistics=path)(targets()).flatten(0, 1)
    x = targets().flatten(0, 1) - targets().mean((0, 1))
    ratio = torch.cdist(x, x)[0, 1:] / torch.cdist(y, y)[0, 1:]
    assert ratio.max() / ratio.min() - 1 < 1e-3


def test_rotations_of_all_real_widths_are_orthogonal():
    for size in (12, 192, 384, 1152, 1408):
        signs = torch.from_numpy(hadamard(size)).float()
        assert torch.equal(signs @ signs.T, size * torch.eye(size))
    assert hadamard(52) is None
    rotation = orthogonal(52)
    assert torch.equal(rotation, orthogonal(52))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(52, dtype=torch.float64))


def test_files_that_do_not_fit_are_refused(tmp_path, path):
    other = tmp_path / "other"
    other.write_bytes(b"no statistics")
    for name in ("", str(tmp_path / "gone"), str(other)):
        with pytest.raises(ConfigError, match=r"objective\.target_statistics"):
            read(name)
    require_same(read(path).facts, FACTS, path)
    with pytest.raises(ConfigError, match=r"target_statistics.*teacher_hash a .*teacher_hash b"):
        require_same(read(path).facts, FACTS | {"teacher_hash": "b"}, path)
