"""Finds ranks whose teacher changed in memory, that compute wrongly, or that are slow.

The training loss does not show that a teacher is damaged, since a student learns the map of a
damaged teacher just as well. Therefore every rank hashes the part of the teacher that it holds (a
gathered weight is the same on all ranks), and computes the map of fixed images. Hash and map must
be equal to those at the start. The time of a short matrix product that waits for no other rank
shows how fast each rank is.

The cost of a check is estimated by arithmetic, for the 1.06B teacher in bf16 on one H100. The hash
of a replicated teacher (a sharded one is hashed in parts) makes about 10 passes over 16 bytes per
element, 1.06e9 x 160 B at 3 TB/s = 0.06 s, and a dozen kernel launches for each of 1,000 tensors,
0.1 s. The map of two images takes 2 x 0.6 TFLOP at a tenth of the peak, 0.01 s. Seven products of
2 x 4096^3 = 0.14 TFLOP each take 0.003 s together, and two collectives are small. A total of 0.2 s
every 500 steps is below 1% of training time if a step takes 0.04 s or more; steps of the 3B run
take seconds. On one CPU core (measured) the hash takes 0.006 s per million elements.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fd_large.ranks import distributed
from fd_large.runtime.hooks import Hook, Setting, Update, Verdict

log = logging.getLogger(__name__)

TEACHER_CHANGED = "teacher changed"
"""The status in summary.json of a run that ends because its teacher changed."""
MAP_TOLERANCE = 0.01
"""Largest tolerated change of the map, as a fraction of the map's norm, since products in bf16 may
be summed in another order. The hash must be equal."""
SLOW = 1.5
"""A rank is slow if it takes more than this multiple of the ranks' median time."""
CHECKS_BETWEEN_NAMINGS = 20
"""Number of checks after which the log names a rank again that is still slow."""
PRODUCTS = 7


def seconds_of_product() -> float:
    """Times a square matrix product on this rank's device, without a collective.

    Returns: the time of the fastest of several tries, in seconds, so that an interruption does not
        count.
    """
    device = distributed.device()
    on_gpu = device.type == "cuda"
    side, dtype = (4096, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(PRODUCTS):
        if on_gpu:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


class Canary(Hook):
    """Checks the teacher every `every` steps, after the last step, and before each checkpoint.

    If the teacher has changed on a rank, the run ends on all ranks without a checkpoint.

    Args:
        every: Number of steps between two checks.
        teacher: Name of the teacher, for messages, or "" for a single teacher.
        shard_of: Returns "PART HASH" of this rank's shard of the teacher; ranks that hold the same
            shard return the same PART. It is called on all ranks.
        map_of: Returns the teacher's map (B, N, C) of a fixed batch. It is called on all ranks.
        seconds: Returns how many seconds a fixed computation takes on this rank. None if this
            canary must not measure the speed, since another teacher's canary measures it.
    """

    def __init__(
        self,
        every: int,
        *,
        shard_of: Callable[[], str],
        map_of: Callable[[], Tensor],
        teacher: str = "",
        seconds: Callable[[], float] | None = seconds_of_product,
    ) -> None:
        self._called = f"THE TEACHER {teacher}".strip()
        self._every, self._shard_of, self._map_of = every, shard_of, map_of
        self._seconds = seconds
        self._changed = False
        self._checks = 0
        self._slow: dict[int, float] = {}
        self._named: dict[int, int] = {}

    def on_start(self, setting: Setting) -> None:
        """Stores the teacher's hash and map, and compares the hashes of ranks with equal shards.

        If hashes differ, the run ends at the first call of `after_update` or `on_save`.

        Args:
            setting: The facts of the run.
        """
        self._map = self._map_of().float()
        self._shard = self._shard_of()
        self._good, self._total = setting.first_update, setting.total_updates
        device = str(distributed.device())
        ranks = distributed.gather_objects((self._shard, distributed.node_name(), device))
        self._places = [f"rank {r} ({host}, {dev})" for r, (_, host, dev) in enumerate(ranks)]
        odd = _odd_holders([shard for shard, _, _ in ranks])
        if odd:
            self._changed = True
            if distributed.is_main():
                log.error(
                    "canary: %s IS NOT THE SAME ON ALL RANKS at the start: %s; got other bits "
                    "than on ranks with the same part, expected equal bits. The run ends. Start "
                    "the same command again without that node, or, if its processors differ by "
                    "design, with --runtime.canary_every 0.",
                    self._called,
                    self._names(odd),
                )

    def after_update(self, update: Update) -> Verdict | None:
        """Checks teacher and speed after every `every` steps and after the last step.

        Args:
            update: The numbers of the finished step.

        Returns: a verdict that ends the run if the teacher has changed, in this check or an earlier
            one; else None.
        """
        done = update.index + 1
        if not self._changed and (done % self._every == 0 or done == self._total):
            self._check(done)
            self._check_speed()
        return Verdict(stop=TEACHER_CHANGED) if self._changed else None

    def on_save(self, index: int) -> Verdict | None:
        """Checks the teacher before a checkpoint, unless it was checked after the same step.

        Args:
            index: Number of finished steps.

        Returns: a verdict that ends the run without the checkpoint if the teacher has changed, else
            None.
        """
        if index != self._good and not self._changed:
            self._check(index)
        return Verdict(stop=TEACHER_CHANGED) if self._changed else None

    def _check(self, done: int) -> None:
        """Compares hash and map on all ranks with those at the start, and logs a changed teacher.

        Args:
            done: Number of finished steps.
        """
        wrong = self._shard_of() != self._shard
        reports = distributed.gather_objects((wrong, self._distance()))
        changed = [rank for rank, (wrong, _) in enumerate(reports) if wrong]
        # A distance that is not a number differs too.
        differs = [rank for rank, (_, far) in enumerate(reports) if not far <= MAP_TOLERANCE]
        if not changed and not differs:
            self._good = done
            return
        self._changed = True
        if distributed.is_main():
            self._report(done, changed, differs, max(far for _, far in reports))

    def _distance(self) -> float:
        """Returns how far the teacher's map of the fixed images is from that at the start.

        Both maps are computed on this rank. The distance is the norm of the difference, divided by
        the norm of the map at the start.
        """
        now, least = self._map_of().float(), torch.finfo(torch.float32).tiny
        return ((now - self._map).norm() / self._map.norm().clamp_min(least)).item()

    def _report(self, done: int, changed: list[int], differs: list[int], distance: float) -> None:
        """Logs on which ranks the teacher has changed.

        Args:
            done: Number of finished steps.
            changed: The ranks whose hash of the teacher has changed.
            differs: The ranks whose map of fixed images has changed.
            distance: Largest distance of a rank's map from its first map (`_distance`).
        """
        if changed:
            evidence = (
                f"on {self._names(changed)}: the bits of the weights are not those of the start"
            )
        else:
            evidence = (
                f"on {self._names(differs)}: the weights have the bits of the start, but the map "
                f"of a fixed batch is off by {distance:.2g} of its norm"
            )
        log.error(
            "canary: %s CHANGED after step %d, seen after step %d, %s. The run ends "
            "without saving later steps; earlier checkpoints are sound. Start the same command "
            "again without that node: it resumes from the newest checkpoint.",
            self._called,
            self._good,
            done,
            evidence,
        )

    def _check_speed(self) -> None:
        """Logs on rank 0 the ranks that were slow both in this check and in the check before.

        A rank is slow if its matrix product took more than `SLOW` times the median over ranks. A
        rank that was logged in the last `CHECKS_BETWEEN_NAMINGS` checks is not logged again.
        Nothing is measured if another teacher's canary measures the speed. All ranks must call this
        method.
        """
        if self._seconds is None:
            return
        self._checks += 1
        seconds = distributed.gather_objects(self._seconds())
        usual = median_low(seconds)
        before = self._slow
        self._slow = {r: s for r, s in enumerate(seconds) if s > SLOW * usual}
        for rank in self._slow.keys() & before.keys():
            if self._checks - self._named.get(rank, -math.inf) >= CHECKS_BETWEEN_NAMINGS:
                self._named[rank] = self._checks
                if distributed.is_main():
                    log.warning(
                        "canary: %s is slow: a fixed matrix product took it %.3g ms, while the "
                        "median rank took %.3g ms, twice in a row; every step waits for this rank",
                        self._places[rank],
                        1e3 * seconds[rank],
                        1e3 * usual,
                    )

    def _names(self, ranks: list[int]) -> str:
        """Returns number, node and device of up to four of `ranks`, and how many more there are."""
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(self._places[rank] for rank in ranks[:4]) + more


def canaries(teachers: Mapping[str, Any], every: int, image_size: int) -> list[Canary]:
    """Returns a canary for each teacher, of which the first also measures the speed of the ranks.

    Args:
        teachers: The placed teachers by name.
        every: Number of steps between two checks; 0 for no canaries.
        image_size: Side of the images of which maps are computed, in pixels.
    """
    return [
        Canary(
            every,
            teacher=name,
            shard_of=teacher.shard_hash,
            map_of=partial(teacher.map_of_fixed_images, image_size),
            seconds=None if number else seconds_of_product,
        )
        for number, (name, teacher) in enumerate(teachers.items() if every else ())
    ]


def _odd_holders(shards: list[str]) -> list[int]:
    """Returns the ranks whose hash differs from the hash of most ranks that hold the same shard.

    If the ranks that hold a shard have different hashes and none of these has a majority, all these
    ranks are returned.

    Args:
        shards: "PART HASH" of each rank.
    """
    holders: dict[str, list[int]] = defaultdict(list)
    for rank, shard in enumerate(shards):
        holders[shard.split()[0]].append(rank)
    odd = []
    for ranks in holders.values():
        counts = Counter(shards[rank] for rank in ranks)
        most, count = counts.most_common(1)[0]
        if len(counts) > 1:
            clear = count > len(ranks) / 2
            odd += [rank for rank in ranks if not clear or shards[rank] != most]
    return sorted(odd)
