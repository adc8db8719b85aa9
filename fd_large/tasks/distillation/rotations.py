"""PHI-S: the rotation after which every channel of a teacher has the same variance.

`y = a H U^T (x - mean)`, where U are the eigenvectors of the covariance, H is a Hadamard matrix
over the square root of its size, and 1 / a^2 is the mean eigenvalue. One number scales all
directions, so that none that says nothing is amplified, as whitening by the covariance would.
Source: Ranzinger et al., arXiv 2410.01680.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def phi_s_matrix(covariance: Tensor) -> Tensor:
    """Returns a H U^T, (C, C) float64, of a covariance (C, C)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = values.clamp(min=0).mean().rsqrt()
    return scale * orthogonal(len(values)) @ vectors.T


def orthogonal(size: int) -> Tensor:
    """Returns a Hadamard matrix over the square root of its size, (size, size) float64.

    Where there is none by `hadamard`, it is a random orthogonal matrix, the same one each time;
    channels then have about the same variance, no longer exactly.
    """
    signs = hadamard(size)
    if signs is not None:
        return torch.from_numpy(signs).double() / size**0.5
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator, device="cpu")
    rotation, triangle = torch.linalg.qr(matrix)
    return rotation * triangle.diagonal().sign()


def hadamard(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix of signs, (size, size) int8; None where no construction gives one.

    The Kronecker product of Sylvester's matrix, as large a one as there is, and one of Paley's. The
    signs are those of NVIDIA's code for RADIO, so that targets are comparable.
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
    signs = np.ones((1, 1), np.int8)
    while len(signs) < size:
        signs = np.kron(np.array([[1, 1], [1, -1]], np.int8), signs)
    return signs


def _paley_1(prime: int) -> np.ndarray:
    signs = np.eye(prime + 1, dtype=np.int8)
    signs[0, 1:], signs[1:, 0] = 1, -1
    signs[1:, 1:] += _residues(prime)
    return signs


def _paley_2(prime: int) -> np.ndarray:
    inner = np.zeros((prime + 1, prime + 1), np.int8)
    inner[0, 1:] = inner[1:, 0] = 1
    inner[1:, 1:] = _residues(prime)
    at_zero, at_one = np.array([[[1, -1], [-1, -1]], [[1, 1], [1, -1]]], np.int8)
    return np.kron(inner == 0, at_zero) + np.kron(inner, at_one)


def _residues(prime: int) -> np.ndarray:
    """1 where row less column is a square modulo the prime, 0 where it is 0, -1 elsewhere."""
    signs = np.full(prime, -1, np.int8)
    signs[np.arange(1, prime) ** 2 % prime] = 1
    signs[0] = 0
    numbers = np.arange(prime)
    return signs[(numbers[:, None] - numbers) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))
