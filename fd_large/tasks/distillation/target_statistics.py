"""Means, deviations and a rotation of a teacher's channels, measured once and kept in a file.

The tokens are those that a run learns: of random crops, resized to the student's grid. Only sums
are held, the second moments among them, in float64: ranks and micro batches change the statistics
as little as they change the teacher's own map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fd_large.errors import ConfigError
from fd_large.files import parse_json, read_bytes, replacing
from fd_large.tasks.distillation.rotations import phi_s_matrix

WHERE = "objective.target_statistics"
MOST_BYTES = 4 << 30
"""Size of such a file; the rotation of 16,384 channels has 2 GB in float64."""
_NAMES = ("mean", "deviation", "phi_s")
_KIND = "fd_large target statistics 1"


class TargetStatistics(NamedTuple):
    """What is known of a teacher's channels.

    Attributes:
        mean: (C,) float64.
        deviation: (C,) float64, the square roots of the unbiased variances.
        phi_s: (C, C) float64: see rotations.py.
        facts: What the tokens come from, which a run that uses the file must have as well.
        digest: Hash of the file; empty before it is written.
    """

    mean: Tensor
    deviation: Tensor
    phi_s: Tensor
    facts: Mapping[str, Any]
    digest: str = ""


def moments(
    targets: Iterable[tuple[Tensor, int]], summed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns mean (C,) and unbiased covariance (C, C) of tokens, float64; a collective.

    Args:
        targets: (tokens (B, N, C), weight), with weight 0 for padding.
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
    """Returns the statistics that mean and covariance give."""
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return TargetStatistics(mean, deviation, phi_s_matrix(covariance), facts)


def write(path: Path, statistics: TargetStatistics) -> None:
    """Writes a file of statistics, whole or not at all."""
    tensors = {name: getattr(statistics, name).contiguous() for name in _NAMES}
    metadata = {"kind": _KIND, "facts": json.dumps(dict(statistics.facts))}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata=metadata)


def read(path: str) -> TargetStatistics:
    """Reads a file of statistics.

    Raises: ConfigError: if it is none.
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
        f"{WHERE}: not a file of statistics; got {got}, expected one that fd-large statistics has "
        "written for this recipe. Make it, or correct the path."
    )


def require_same(stored: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    """Refuses statistics of other tokens than those of a run.

    Args:
        stored: The facts in the file.
        own: Those of the run.
        path: The file.

    Raises: ConfigError: naming what differs.
    """
    other = [name for name in own if stored.get(name) != own[name]]
    if other:
        got, expected = (
            ", ".join(f"{name} {facts.get(name)}" for name in other) for facts in (stored, own)
        )
        raise ConfigError(
            f"{WHERE}: statistics of other targets than this run's; got {got} in {path}, expected "
            f"{expected}. Make the file for this recipe: fd-large statistics."
        )
