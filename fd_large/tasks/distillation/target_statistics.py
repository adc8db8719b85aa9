"""Means, deviations and a rotation of a teacher's channels, measured once and stored in a file.

The statistics are over the teacher's tokens of a run's target: tokens of random crops, on the grid
on which student and teacher are compared. Memory holds only sums of tokens and of products of
channels, in float64. Therefore the numbers of ranks and of micro-batches change the statistics as
little as they change the teacher's map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fd_large.errors import ConfigError
from fd_large.files import parse_json, read_bytes, replacing

WHERE = "objective.target_statistics"
MOST_BYTES = 4 << 30
"""Largest size of a file of statistics; the rotation of 16,384 channels has 2 GB in float64."""
_NAMES = ("mean", "deviation", "phi_s")
_KIND = "fd_large target statistics 1"


class TargetStatistics(NamedTuple):
    """Mean, deviation and rotation of a teacher's channels.

    Attributes:
        mean: (C,) float64.
        deviation: (C,) float64, the square roots of the unbiased variances.
        phi_s: (C, C) float64, the result of `phi_s_matrix`.
        facts: Settings that decide the tokens, by name. A run that uses the file must have the same
            settings.
        digest: Hash of the file; "" for statistics that were not read from a file.
    """

    mean: Tensor
    deviation: Tensor
    phi_s: Tensor
    facts: Mapping[str, Any]
    digest: str = ""


def moments(
    targets: Iterable[tuple[Tensor, int]], summed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the mean (C,) and the unbiased covariance (C, C) of tokens, float64.

    All ranks must call this function.

    Args:
        targets: This rank's batches, each a pair (tokens (B, N, C), weight). The weight is 1, or 0
            for a repeated batch that must not count.
        summed: Sums a tensor over the ranks.
    """
    sums: Tensor | None = None
    for tokens, weight in targets:
        rows = tokens.flatten(0, -2).double()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        part = rows.T @ rows * weight
        sums = part if sums is None else sums + part
    assert sums is not None
    sums = summed(sums).cpu()
    count, mean = sums[-1, -1], sums[-1, :-1] / sums[-1, -1]
    return mean, (sums[:-1, :-1] - count * mean.outer(mean)) / (count - 1)


def statistics_of(mean: Tensor, covariance: Tensor, facts: Mapping[str, Any]) -> TargetStatistics:
    """Returns the statistics of a teacher's channels.

    Args:
        mean: (C,).
        covariance: (C, C), unbiased.
        facts: Settings that decide the tokens, by name.
    """
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return TargetStatistics(mean, deviation, phi_s_matrix(covariance), facts)


def write(path: Path, statistics: TargetStatistics) -> None:
    """Writes `statistics` into the file `path`, atomically; an existing file is replaced."""
    tensors = {name: getattr(statistics, name).contiguous() for name in _NAMES}
    metadata = {"kind": _KIND, "facts": json.dumps(dict(statistics.facts))}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata=metadata)


def read(path: str) -> TargetStatistics:
    """Reads the file of statistics `path`, which `fd-large statistics` wrote.

    Raises: ConfigError: if the file cannot be read or is not a file of statistics.
    """
    remedy = "Name what fd-large statistics has written for this recipe."
    data = read_bytes(path, where=WHERE, remedy=remedy, max_bytes=MOST_BYTES)
    try:
        digest = hashlib.sha256(data).hexdigest()[:16]
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: torch.from_numpy(file.get_tensor(name)) for name in _NAMES}
        if metadata.get("kind") == _KIND:
            return TargetStatistics(**tensors, facts=parse_json(metadata["facts"]), digest=digest)
        got = f"{path}, of another kind"
    except (OSError, SafetensorError) as error:
        got = f"{path}: {error}" if path else "nothing"
    raise ConfigError(
        f"{WHERE}: not a file of statistics; got {got}, expected a file that fd-large "
        "statistics wrote for this recipe. Make the file, or correct the path."
    )


def require_same(stored: Mapping[str, Any], run_facts: Mapping[str, Any], path: str) -> None:
    """Checks that statistics were measured on tokens of the run's target.

    Args:
        stored: The facts in the file, which may have further names.
        run_facts: The run's facts, as {name: value}.
        path: Path of the file, for messages.

    Raises: ConfigError: if facts differ; the message names the differences.
    """
    other = [name for name in run_facts if stored.get(name) != run_facts[name]]
    if other:
        got, expected = (
            ", ".join(f"{name} {facts.get(name)}" for name in other)
            for facts in (stored, run_facts)
        )
        raise ConfigError(
            f"{WHERE}: statistics of other targets than this run's; got {got} in {path}, expected "
            f"{expected}. Make the file for this recipe: fd-large statistics."
        )


def phi_s_matrix(covariance: Tensor) -> Tensor:
    """Returns the matrix of PHI-S, a scaled rotation after which each channel has variance 1.

    The matrix is a H U^T, where the columns of U are the eigenvectors of the covariance, H is a
    Hadamard matrix divided by the square root of its size, and 1 / a^2 is the mean eigenvalue. All
    directions are scaled by the same number, so that uninformative directions are not amplified, as
    whitening with the covariance would do. Source: Ranzinger et al., arXiv 2410.01680.

    Args:
        covariance: (C, C).

    Returns: (C, C) float64, to be multiplied with tokens from which the mean was subtracted.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = values.clamp(min=0).mean().rsqrt()
    return scale * orthogonal(len(values)) @ vectors.T


def orthogonal(size: int) -> Tensor:
    """Returns a Hadamard matrix divided by the square root of its size, (size, size) float64.

    If `hadamard` has no matrix of this size, the result is a fixed random orthogonal matrix. After
    PHI-S with such a matrix, the variances of the channels are only approximately equal.
    """
    signs = hadamard(size)
    if signs is not None:
        return torch.from_numpy(signs).double() / size**0.5
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator, device="cpu")
    rotation, triangle = torch.linalg.qr(matrix)
    return rotation * triangle.diagonal().sign()


def hadamard(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix, (size, size) int8, or None if this code cannot construct one.

    The matrix is a Sylvester matrix if the size is a power of two. Otherwise it is the Kronecker
    product of the largest possible Sylvester matrix and a Paley matrix. The signs are the same as
    in NVIDIA's code for RADIO, so that targets are comparable.
    """
    two_power = size & -size
    if two_power == size:
        return _sylvester(size)
    power = two_power // 2
    while power >= 1 and size % 4 == 0:
        rest = size // power
        if (rest - 1) % 4 == 3 and _is_prime(rest - 1):
            return np.kron(_sylvester(power), _paley_1(rest - 1))
        if (rest // 2 - 1) % 4 == 1 and _is_prime(rest // 2 - 1):
            return np.kron(_sylvester(power), _paley_2(rest // 2 - 1))
        power //= 2
    return None


def _sylvester(size: int) -> np.ndarray:
    """Returns Sylvester's Hadamard matrix, (size, size) int8; `size` must be a power of two."""
    signs = np.ones((1, 1), np.int8)
    while len(signs) < size:
        signs = np.kron(np.array([[1, 1], [1, -1]], np.int8), signs)
    return signs


def _paley_1(prime: int) -> np.ndarray:
    """Returns the Hadamard matrix of Paley's first construction, (prime + 1, prime + 1) int8.

    `prime` must be a prime number whose remainder by 4 is 3.
    """
    signs = np.eye(prime + 1, dtype=np.int8)
    signs[0, 1:], signs[1:, 0] = 1, -1
    signs[1:, 1:] += _residues(prime)
    return signs


def _paley_2(prime: int) -> np.ndarray:
    """Returns the Hadamard matrix of Paley's second construction, int8.

    The side of the matrix is 2 * (prime + 1). `prime` must be a prime number whose remainder by 4
    is 1.
    """
    inner = np.zeros((prime + 1, prime + 1), np.int8)
    inner[0, 1:] = inner[1:, 0] = 1
    inner[1:, 1:] = _residues(prime)
    at_zero, at_one = np.array([[[1, -1], [-1, -1]], [[1, 1], [1, -1]]], np.int8)
    return np.kron(inner == 0, at_zero) + np.kron(inner, at_one)


def _residues(prime: int) -> np.ndarray:
    """Returns the matrix of quadratic residues modulo `prime`, (prime, prime) int8.

    An element is 0 on the diagonal, 1 if row - column is a square modulo the prime, and else -1.
    """
    signs = np.full(prime, -1, np.int8)
    signs[np.arange(1, prime) ** 2 % prime] = 1
    signs[0] = 0
    numbers = np.arange(prime)
    return signs[(numbers[:, None] - numbers) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
