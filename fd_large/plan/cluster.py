"""Describes machines by nodes, network and GPUs, and computes the times of collectives.

An all-gather or reduce-scatter of a whole model of S bytes moves S (n - 1) / n bytes over each
rank's link, where n is the number of ranks in a node. Between N nodes, such a collective moves
S (N - 1) / N bytes over all network cards of a node together, since each byte has to enter a node
once. Links and network work at the same time, and the slower of them determines the duration.
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
        gpus: Number of GPUs, which is the number of ranks.
        gpus_per_node: Number of GPUs in a node.
        nic_gigabits: Rate of a network card in each direction, in Gb/s.
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
        """Number of ranks in a full node of this run."""
        return min(self.gpus, self.gpus_per_node)

    def network(self, rates: Rates) -> float:
        """Returns the bytes/s that collectives reach over all network cards of a node together.

        The result is the fraction `rates.network_share` of the cards' rate.
        """
        return self.nic_gigabits / 8 * 1e9 * self.nics_per_node * rates.network_share

    def seconds(self, size: float, rates: Rates, *, span: Span = "all", calls: int = 1) -> float:
        """Returns the seconds of an all-gather or reduce-scatter of a whole model.

        Args:
            size: Size of the model in bytes.
            rates: Rates of a GPU and its links.
            span: "all" for a collective over all ranks, "node" for one inside each node.
            calls: Number of collectives into which the operation is divided.
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
    """The hardware for which a run is planned.

    Attributes:
        cluster: The numbers of GPUs and nodes, and the network.
        rates: Rates of a GPU and its links.
    """

    cluster: Cluster
    rates: Rates
