"""Nodes and their network, and how long the collectives of a training step occupy it.

S is what one gather or scatter of a whole model moves: its parameters times the bytes of their
type. Over n ranks each rank sends and receives S (n - 1) / n. Between N nodes the cards of a node
carry S (N - 1) / N together, since each byte has to enter a node once; inside a node each rank's
link carries S (n - 1) / n. Both run at the same time, the slower one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fd_large.plan.rates import Rates

Span = Literal["all", "node", "across"]

# Of a collective, beside its bytes and its start: each further node of a ring. Assumed.
PER_NODE_SECONDS = 2e-6


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes.

    Attributes:
        gpus: Ranks in all.
        gpus_per_node: Ranks of a node.
        nic_gigabits: Of one network card, per second and direction.
        nics_per_node: Network cards of a node.
    """

    gpus: int
    gpus_per_node: int
    nic_gigabits: float
    nics_per_node: int

    @property
    def nodes(self) -> int:
        """Nodes, the last one maybe not full."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def node_size(self) -> int:
        """Ranks that share a node in this run."""
        return min(self.gpus, self.gpus_per_node)

    def network(self, rates: Rates) -> float:
        """Bytes/s into a node that collectives reach."""
        return self.nic_gigabits / 8 * 1e9 * self.nics_per_node * rates.network_share

    def seconds(self, size: float, rates: Rates, *, span: Span = "all", calls: int = 1) -> float:
        """Returns how long one gather or scatter of a model takes.

        Args:
            size: S in bytes.
            rates: Of the card and its links.
            span: Over all ranks, inside each node, or between the nodes only (ranks of equal place,
                each with its share of S).
            calls: Collectives into which it is cut.
        """
        inside = nodes = 1
        if span != "across":
            inside = self.node_size
        if span != "node":
            nodes = self.nodes
        if inside * nodes == 1:
            return 0.0
        link = size * (inside - 1) / inside / rates.link if inside > 1 else 0.0
        wire = size * (nodes - 1) / nodes / self.network(rates) if nodes > 1 else 0.0
        start = calls * (rates.start_seconds + PER_NODE_SECONDS * (nodes - 1))
        return max(link, wire) + start
