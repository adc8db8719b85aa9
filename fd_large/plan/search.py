"""Finds the settings with which a run fits into the memory of a machine, and sorts them by time.

Candidates whose times differ by less than `SAME_TIME` are sorted by communication. For a candidate
that does not fit, the reason is given.
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
    """A candidate that does not fit into memory, even with a micro-batch of one image.

    Attributes:
        candidate: The candidate.
        reason: The needed and the usable memory, for tables.
    """

    candidate: Candidate
    reason: str


def search(load: Workload, machine: Machine) -> tuple[list[Estimate], list[Refused]]:
    """Tries all candidates for a workload on a machine.

    Returns: estimates for the candidates that fit into memory, each with the micro-batch size that
        gives the fastest step, fastest candidate first; the candidates that do not fit.
    Raises: ConfigError: if the global batch size is not a multiple of the number of ranks.
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
    """Returns the size of a checkpoint in bytes: the float32 master weights and the moments."""
    return 4 * (1 + load.moments) * load.parameters


def num_steps(epochs: int, images: int, global_batch_size: int) -> int:
    """Returns the number of steps of a run, where an epoch's incomplete global batch is dropped.

    Args:
        epochs: Number of epochs.
        images: Number of images in the dataset.
        global_batch_size: Number of images in a step, over all ranks.
    """
    return epochs * (images // global_batch_size)


def _candidates(machine: Machine, *, teachers: int) -> Iterator[Candidate]:
    """Yields all candidates for a machine, with a micro-batch of one image.

    Of several teachers, the largest are sharded first, since this saves most memory.

    Args:
        machine: The hardware.
        teachers: Number of teachers that may be sharded.
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
    """Sorts candidates of about equal time by communication, then by memory.

    Args:
        ordered: Estimates, fastest first. Times that exceed the fastest remaining time by at most
            the fraction `SAME_TIME` count as equal.
    """
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
