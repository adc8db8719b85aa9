"""Finds the candidates that fit a workload and a machine, and why the others do not fit.

Candidates are sorted by time; if times differ by less than `SAME_TIME`, by communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fd_large.errors import ConfigError
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.peak_memory import HEADROOM, PeakMemory, peak_memory
from fd_large.plan.step_time import Estimate, estimate
from fd_large.plan.workload import Workload

SAME_TIME = 0.01
"""Candidates whose times differ by less than this fraction count as equally fast."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A candidate that does not fit with any micro-batch."""

    candidate: Candidate
    reason: str


def search(load: Workload, machine: Machine) -> tuple[list[Estimate], list[Refused]]:
    """Returns the candidates that fit, in order, with their best micro-batches, and the others.

    Raises: ConfigError: if the ranks do not divide the global batch.
    """
    batch, ranks = load.global_batch_size, machine.cluster.gpus
    share = batch // ranks
    if batch % ranks:
        raise ConfigError(
            f"batch.global_batch_size: not divisible by the ranks; got {batch} images for {ranks} "
            f"ranks, expected a multiple. Set --batch.global_batch_size {_multiple(batch, ranks)}, "
            "or another --gpus."
        )
    counted = load.counts[False].images
    whole = range(load.norm_group, share + 1, load.norm_group)
    sizes = [size for size in whole if share % size == 0] or [share]
    if counted in sizes:  # The counts hold for no other size.
        sizes = [counted]
    elif counted:  # Smaller ones take no more memory; nothing is known of larger ones.
        sizes = [size for size in sizes if size < counted]
    good: list[Estimate] = []
    bad: list[Refused] = []
    teachers = len(load.teachers) if load.may_split_frozen else 0
    for candidate in _candidates(machine, teachers=teachers):
        memory = peak_memory(load, candidate, machine)
        if not memory.fits(machine.rates):
            bad.append(Refused(candidate=candidate, reason=_too_large(memory, machine)))
            continue
        tried = [
            estimate(load, each, machine)
            for each in (replace(candidate, micro_batch_size=size) for size in sizes)
            if peak_memory(load, each, machine).fits(machine.rates)
        ]
        good.append(min(tried, key=lambda setting: (setting.seconds.total, setting.memory.total)))
    good.sort(key=lambda setting: setting.seconds.total)
    return _ties_by_communication(good), bad


def checkpoint_bytes(load: Workload) -> int:
    """Returns the size of one stored checkpoint: float32 masters and moments."""
    return 4 * (1 + load.moments) * load.parameters


def num_steps(epochs: int, images: int, global_batch_size: int) -> int:
    """Returns the steps of a run on a number of images; an epoch's remainder is dropped."""
    return epochs * (images // global_batch_size)


def _candidates(machine: Machine, *, teachers: int) -> Iterator[Candidate]:
    """Yields candidates with a micro-batch of one image.

    The largest of several teachers are split first: they save most.

    Args:
        machine: Ranks and nodes.
        teachers: Number of the teachers that may be split.
    """
    ranks, nodes = machine.cluster.gpus, machine.cluster.nodes
    placements: list[Literal["replicated", "node", "sharded"]] = ["replicated"]
    shared = nodes > 1 and machine.cluster.node_size > 1
    if teachers and shared:
        placements.append("node")
    if teachers and ranks > 1:
        placements.append("sharded")
    splits = [
        (teacher, whole)
        for teacher in placements
        for whole in range(1 if teacher == "replicated" else teachers)
    ]
    # One rank has nothing to split: in float32 the engine runs stages 1 and 2 as stage 0.
    unsplit = ranks == 1 and not machine.rates.bfloat16
    for stage in (0, 3) if unsplit else (1, 2, 3):
        for teacher, whole in splits:
            for hpz in (False, True) if stage == 3 and shared else (False,):
                for checkpointing in (False, True):
                    yield Candidate(
                        stage=stage,  # type: ignore[arg-type]
                        hpz=hpz,
                        teacher=teacher,
                        whole=whole,
                        checkpointing=checkpointing,
                        micro_batch_size=1,
                    )


def _ties_by_communication(ordered: list[Estimate]) -> list[Estimate]:
    """Sorts equally fast candidates by their communication, then by their memory."""
    result: list[Estimate] = []
    left = list(ordered)
    while left:
        limit = left[0].seconds.total * (1 + SAME_TIME)
        same = [setting for setting in left if setting.seconds.total <= limit]
        result += sorted(same, key=lambda setting: (_communication(setting), setting.memory.total))
        left = left[len(same) :]
    return result


def _communication(setting: Estimate) -> float:
    return setting.seconds.communication * setting.seconds.accumulation + setting.seconds.finish


def _too_large(memory: PeakMemory, machine: Machine) -> str:
    limit = HEADROOM * machine.rates.memory_bytes
    parts = {
        "states": memory.states,
        "teacher": memory.teacher,
        "activations": memory.activations,
        "buffers": memory.buffers,
    }
    most = max(parts, key=lambda name: parts[name])
    return (
        f"{memory.total / 1e9:.1f} GB for one image ({most} {parts[most] / 1e9:.1f}), "
        f"{limit / 1e9:.1f} usable"
    )


def _multiple(batch: int, ranks: int) -> int:
    return max(1, round(batch / ranks)) * ranks
