"""Computes the seconds of communication in a step, during or after computation.

The table shows the collectives of each micro-batch and of each step. S and T are the seconds of an
all-gather or reduce-scatter of the student and of the teacher (`plan.cluster`).

| ZeRO | student, each micro-batch            | student, each step           |
|------|--------------------------------------|------------------------------|
| 0    | none                                 | gradients 2 S                |
| 1    | none                                 | gradients 2 S, parameters S  |
| 2    | gradients 2 S                        | parameters S                 |
| 3    | S forward, R backward, gradients S   | none                         |

Parameters are sent in their data type. Gradients are sent in the data type in which they are summed
over ranks, which is float32 over more than `MOST_BFLOAT16_SUMMANDS` ranks. At stages 0 to 2
gradients are all-reduced, which takes 2 S (a reduce-scatter and an all-gather). At stages 1 and 2
on up to `MOST_OWNERS` ranks, each gradient is reduced only to the rank that updates its parameter,
which takes S (engine/zero/gradient_reduction.py). R is S times the fraction of parameters that have
to be gathered again in the backward pass. Layers that are used again within
`stage3_max_reuse_distance` elements of the forward and backward pass stay whole.

A sharded teacher adds T for each micro-batch, over all ranks or inside each node. With hpZ the
backward pass gathers inside a node.
"""

from __future__ import annotations

from fd_large.plan.buckets import MOST_OWNERS, gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.workload import Workload

# Half of DeepSpeed's `stage3_max_reuse_distance`, which counts forward and back.
KEPT_ELEMENTS = 500_000_000


def of_micro_batch(load: Workload, candidate: Candidate, machine: Machine) -> float:
    """Returns the seconds of the collectives in each micro-batch of a rank.

    Args:
        load: The training run.
        candidate: The settings, of which stage, hpZ and the teachers' placement count here.
        machine: The hardware.
    """
    cluster, rates = machine.cluster, machine.rates
    whole = load.compute_bytes(machine) * load.parameters
    calls = sum(1 for n in load.student_sizes if n > load.threshold)
    total = 0.0
    if candidate.stage == 3:
        span = "node" if candidate.hpz else "all"
        total += cluster.seconds(whole, rates, calls=calls)
        if load.counts_of(candidate, machine).modules.get("first_pass"):
            total += cluster.seconds(whole, rates, calls=calls)
        total += gathered_again(load) * cluster.seconds(whole, rates, span=span, calls=calls)
        total += _scatter(load, machine)
    elif candidate.stage == 2:
        total += _scatters(candidate, machine) * _scatter(load, machine)
    if split := load.split_sizes(candidate):
        size = 2 if load.teacher_bfloat16(machine) else 4
        calls = sum(1 for n in split if n > load.threshold)
        span = "node" if candidate.teacher == "node" else "all"
        total += cluster.seconds(size * sum(split), rates, span=span, calls=calls)
    return total


def of_step(load: Workload, candidate: Candidate, machine: Machine) -> float:
    """Returns the seconds of the collectives after the last micro-batch of a step.

    The result is 0 at stage 3, which has no such collectives.

    Args:
        load: The training run.
        candidate: The settings, of which the stage counts here.
        machine: The hardware.
    """
    total = 0.0
    if candidate.stage in (1, 2):
        whole = load.compute_bytes(machine) * load.parameters
        total += machine.cluster.seconds(whole, machine.rates)
    if candidate.stage <= 1:
        total += _scatters(candidate, machine) * _scatter(load, machine)
    return total


def gathered_again(load: Workload) -> float:
    """Returns the fraction of the student's parameters that ZeRO-3 gathers again in backward.

    The other parameters are still whole since the forward pass.
    """
    return max(0.0, 1 - KEPT_ELEMENTS / load.parameters)


def _scatter(load: Workload, machine: Machine) -> float:
    """Returns the seconds of a reduce-scatter of all gradients, with one collective per bucket.

    Args:
        load: The training run, which has the number of gradients.
        machine: The hardware.
    """
    buckets = -(-load.parameters // gradient_bucket(load.parameters))
    gradients = load.sum_bytes(machine) * load.parameters
    return machine.cluster.seconds(gradients, machine.rates, calls=buckets)


def _scatters(candidate: Candidate, machine: Machine) -> int:
    """Returns how many times as long as `_scatter` the gradients' reduction takes at stages 0 to 2.

    The result is 2 for an all-reduce, and 1 if each gradient is reduced only to the rank that
    updates its parameter.
    """
    return 1 if candidate.stage and machine.cluster.gpus <= MOST_OWNERS else 2
