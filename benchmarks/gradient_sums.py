"""How far a sum of gradients over many ranks is from the exact one, by data type and by route.

    python benchmarks/gradient_sums.py

A simulation on one process. NCCL adds in the data type that it sends, so that a partial sum is
rounded at every hop: a ring has as many hops as ranks, a tree (a chain inside each node of eight,
a binary tree between the nodes) a few more than eight. Each element of a rank's gradient is its
mean plus noise of deviation 1; `mean` is the deviation of the means over the elements. Printed is
the L2 norm of the error of the averaged gradient over that of the exact one. Sums inside a switch
(NVLink SHARP) are not simulated; they round less often.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKS = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8
ELEMENTS = 20_000


def chain(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds rank after rank; parts (R, ..., N), returns (..., N) of `dtype`."""
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = (total.float() + part.to(dtype).float()).to(dtype)
    return total


def tree(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds the ranks of each node in a chain, then the nodes in pairs, pairs of pairs, ..."""
    if len(parts) <= NODE:
        return chain(parts, dtype)
    totals = chain(parts.unflatten(0, (-1, NODE)).transpose(0, 1), dtype)
    return pairs(totals, dtype)


def pairs(totals: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds (R, N) in pairs, R a power of two; returns (N,) of `dtype`."""
    while len(totals) > 1:
        totals = (totals[::2].float() + totals[1::2].float()).to(dtype)
    return totals[0]


def float32_between_nodes(parts: Tensor) -> Tensor:
    """Adds in bfloat16 inside each node, and in float32 between them."""
    if len(parts) <= NODE:
        return chain(parts, torch.bfloat16)
    nodes = chain(parts.unflatten(0, (-1, NODE)).transpose(0, 1), torch.bfloat16)
    return pairs(nodes.float(), torch.float32)


ROUTES = {
    "bfloat16 ring": lambda parts: chain(parts, torch.bfloat16),
    "bfloat16 tree": lambda parts: tree(parts, torch.bfloat16),
    "float32 between nodes": float32_between_nodes,
    "float32 ring": lambda parts: chain(parts, torch.float32),
}


def errors(ranks: int, mean: float, *, elements: int = ELEMENTS, seed: int = 0) -> dict[str, float]:
    """Returns the relative error of each route, of gradients that are bfloat16 on every rank."""
    generator = torch.Generator().manual_seed(seed)
    means = mean * torch.randn(elements, generator=generator)
    parts = (means + torch.randn(ranks, elements, generator=generator)).bfloat16().float()
    exact = parts.double().mean(0)
    return {
        name: ((route(parts).double() / ranks - exact).norm() / exact.norm()).item()
        for name, route in ROUTES.items()
    }


def main() -> None:
    """Prints a table in Markdown."""
    for mean in (0.0, 0.3):
        print(f"\nmean {mean}\n\n| ranks | {' | '.join(ROUTES)} |\n|{'---|' * (len(ROUTES) + 1)}")
        for ranks in RANKS:
            cells = " | ".join(f"{error:.1e}" for error in errors(ranks, mean).values())
            print(f"| {ranks} | {cells} |")


if __name__ == "__main__":
    main()
