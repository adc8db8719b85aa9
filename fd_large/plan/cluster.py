"""Describes machines by nodes, network and cards, and computes the times of collectives.

One gather or scatter of a whole model moves S bytes: parameters times bytes per parameter. Over n
ranks, each rank sends and receives S (n - 1) / n. Between N nodes, the network cards of a node
together carry S (N - 1) / N, since each byte has to enter a node once; inside a node, each rank's
link carries S (n - 1) / n. Both run at the same time, and the slower one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fd_large.plan.rates import Rates

Span = Literal["all", "node"]

# What each further node of a ring adds to a collective, beside its bytes and its start. Assumed.
PER_NODE_SECONDS = 2e-6


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal nodes.

    Attributes:
        gpus: Number of ranks.
        gpus_per_node: Number of ranks in a node.
        nic_gigabits: Rate of one network card and direction, in Gb/s.
        nics_per_node: Number of network cards in a node.
    """

    gpus: int
    gpus_per_node: int
    nic_gigabits: float
    nics_per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes; the last node may be partly used."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def node_size(self) -> int:
        """Number of ranks that share a node in this run."""
        return min(self.gpus, self.gpus_per_node)

    def network(self, rates: Rates) -> float:
        """Returns the bytes/s into a node that collectives achieve."""
        return self.nic_gigabits / 8 * 1e9 * self.nics_per_node * rates.network_share

    def seconds(self, size: float, rates: Rates, *, span: Span = "all", calls: int = 1) -> float:
        """Returns the seconds of one gather or scatter of a model.

        Args:
            size: S in bytes.
            rates: Rates of the card and its links.
            span: Whether it is over all ranks, or inside each node.
            calls: Number of collectives into which the gather or scatter is cut.
        """
        inside, nodes = self.node_size, 1 if span == "node" else self.nodes
        if inside * nodes == 1:
            return 0.0
        link = size * (inside - 1) / inside / rates.link if inside > 1 else 0.0
        wire = size * (nodes - 1) / nodes / self.network(rates) if nodes > 1 else 0.0
        start = calls * (rates.start_seconds + PER_NODE_SECONDS * (nodes - 1))
        return max(link, wire) + start


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks and cards for which a run is planned.

    Attributes:
        cluster: Ranks, nodes, network.
        rates: Rates of a card and its links.
    """

    cluster: Cluster
    rates: Rates
