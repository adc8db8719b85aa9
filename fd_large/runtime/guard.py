"""Refuses steps with an abnormal loss or gradient norm, and rolls a run back after several.

A run with a non-finite state is rolled back at once, since no later step could be accepted or
saved. If no step is accepted after a roll-back, the next roll-back goes further back.

Abnormal means NaN, infinite, or far above the last accepted steps, in units of their spread. The
spread is the median distance from the median, so that a spike does not enlarge it; it has a lower
limit for flat curves. The guard's state follows from RUN/metrics.jsonl and RUN/incidents alone,
so a resumed run decides like an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from fd_large.errors import FDError
from fd_large.files import read_json, write_json
from fd_large.ranks import distributed
from fd_large.recipes.file_names import INCIDENT, INCIDENTS, METRICS, STEP, of_step
from fd_large.recipes.sections import Guard as Limits
from fd_large.runtime.hooks import GUARD, Evidence, Hook, Setting, Update, Verdict
from fd_large.runtime.run_folder import rows_before, written_or_logged

log = logging.getLogger(__name__)

WINDOW = 100
"""Number of accepted steps over which the running median and spread are taken."""
KNOWN = 20
"""Number of accepted steps after which a finite number can be abnormal."""
LOSS_FLOOR, NORM_FLOOR = 0.05, 0.25
"""Least spread of the loss, as a fraction of its median, and of the norm, in natural logarithms."""
NAMED = 5
"""Largest number of non-finite tensors that an incident names for each rank."""
INCIDENTS_WITH_IMAGES, RANKS_WITH_IMAGES = 20, 4
"""Numbers of the newest incidents that keep images, and of ranks whose images each one has."""
MAD_TO_DEVIATION = 1.4826  # Exact for a normal distribution.

Values = tuple[int, float, float]
"""Update, loss, gradient norm."""


@dataclass(frozen=True)
class Finding:
    """An abnormal number of a step.

    Attributes:
        what: `loss` or `gradient norm`.
        value: The step's loss or gradient norm.
        median: Median of the accepted steps before it, or None.
        limit: Largest normal value; None while too few accepted steps are known.
        spread: Spread of the accepted steps, for the norm in natural logarithms; None if `median`
            is None.
    """

    what: str
    value: float
    median: float | None
    limit: float | None
    spread: float | None

    def in_words(self) -> str:
        """Returns a clause, such as "its loss is nan"."""
        if not math.isfinite(self.value):
            usual = "" if self.median is None else f" (median so far {self.median:.4g})"
            return f"its {self.what} is {self.value:g}{usual}"
        return (
            f"its {self.what} is {self.value:.4g}, far above the median {self.median:.4g} "
            f"(limit {self.limit:.4g})"
        )


def findings(update: Update, accepted: Iterable[Values], spread: float) -> list[Finding]:
    """Returns the abnormal numbers of a step, given the accepted steps before it.

    Args:
        update: The step to judge, by its loss and its gradient norm.
        accepted: The last `WINDOW` accepted steps before it, oldest first.
        spread: Number of spreads above the median up to which a value is normal.
    """
    known = list(accepted)
    judgements = (
        _off("loss", update.loss, [loss for _, loss, _ in known], spread),
        _off("gradient norm", update.grad_norm, [n for _, _, n in known], spread, factors=True),
    )
    return [finding for finding in judgements if finding is not None]


def _off(
    name: str, value: float, known: list[float], allowed: float, *, factors: bool = False
) -> Finding | None:
    """Returns a finding for an abnormal number; with `factors`, its logarithm is judged."""
    middle = spread = limit = None
    if known:
        values = [math.log(max(each, 1e-30)) for each in known] if factors else known
        middle = median(values)
        spread = MAD_TO_DEVIATION * median(abs(each - middle) for each in values)
        spread = max(spread, NORM_FLOOR if factors else LOSS_FLOOR * abs(middle))
        if len(known) >= KNOWN:
            limit = middle + allowed * spread
    if factors:
        middle, limit = (None if x is None else math.exp(min(x, 700.0)) for x in (middle, limit))
    far = not math.isfinite(value) or (limit is not None and value > limit)
    return Finding(name, value, middle, limit, spread) if far else None


@dataclass
class _Past:
    """The guard's memory of earlier steps.

    Attributes:
        accepted: The last accepted steps that the present weights descend from.
        refused: The refused steps since the last accepted one.
        roll_backs: {step after which the run was rolled back, from 0: finished steps of the state
            that was restored}.
        restored: Finished steps of the state that the last roll-back restored; None if a step was
            accepted since.
    """

    accepted: deque[Values]
    refused: list[int]
    roll_backs: dict[int, int]
    restored: int | None = None

    @property
    def at_most(self) -> int:
        """Latest step to which a roll-back may return."""
        if self.restored is None:
            return self.refused[0]
        # The state of the last roll-back did not help. Nor does a copy of it, such as the
        # checkpoint that is saved right after a roll-back.
        step = self.restored
        while (copied := self.roll_backs.get(step - 1, step)) < step:
            step = copied
        return step - 1

    def add(self, update: int, loss: float, norm: float, *, skipped: bool) -> None:
        if skipped:
            self.refused.append(update)
            return
        self.refused.clear()
        self.restored = None
        if math.isfinite(loss) and math.isfinite(norm):
            self.accepted.append((update, loss, norm))


def past_of(rows: Iterable[Mapping[str, Any]], roll_backs: Mapping[int, int]) -> _Past:
    """Returns the guard's memory after the steps of `rows`.

    Args:
        rows: Rows of metrics.jsonl.
        roll_backs: See `roll_backs_of`.
    """
    past = _Past(deque(), [], {})
    for row in rows:
        update = row["update"]
        past.add(update, row["loss"], row["grad_norm"], skipped=row.get("skipped", False))
        if (restored := roll_backs.get(update)) is not None:
            past.roll_backs[update] = restored
            past.refused.clear()
            past.restored = restored
            past.accepted = deque(item for item in past.accepted if item[0] < restored)
    past.accepted = deque(past.accepted, maxlen=WINDOW)
    return past


class Guard(Hook):
    """Skips bad steps, rolls back after several in a row, and ends a run that does not recover.

    Each skipped step gets a folder in RUN/incidents: the abnormal numbers, their ranks, and the
    images.

    Args:
        limits: Limits for abnormal steps, and their allowed number.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def on_start(self, setting: Setting) -> None:
        """Restores the guard's memory of the run before a resume."""
        self._setting = setting
        self._incidents = setting.folder / INCIDENTS
        self._findings: list[Finding] = []
        self._broken: list[dict[str, Any]] = []
        self._incident: dict[str, Any] = {}
        if distributed.is_main():
            _set_aside(self._incidents, setting.first_update)
        self._past = self._read(setting.first_update)

    def judge(self, update: Update) -> Verdict:
        """Refuses a step with an abnormal loss or gradient norm."""
        self._broken = []
        self._findings = findings(update, self._past.accepted, self._limits.spread)
        return Verdict(skip=bool(self._findings))

    def on_skip(self, update: Update, evidence: Evidence) -> None:
        """Writes the incident and logs the abnormal numbers."""
        mine: dict[str, Any] = {
            "rank": distributed.rank(),
            "host": distributed.node_name(),
            "losses": evidence.losses,
            "positions": evidence.positions.tolist(),
            "indices": evidence.indices.tolist(),
            "names": [self._setting.name_of(index) for index in evidence.indices.tolist()],
            "not_finite": evidence.not_finite[:NAMED],
        }
        folder = of_step(self._incidents, update.index + 1)
        part = folder.with_name(folder.name + ".part")
        if distributed.is_main():
            with written_or_logged(folder):
                self._setting.must_own()
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        ranks = distributed.gather_objects(mine)
        culprits = culprits_of([entry["losses"] for entry in ranks])
        self._broken = [
            {"rank": entry["rank"], "kind": key.partition(".")[0], "tensor": key.partition(".")[2]}
            for entry in ranks
            for key in entry.pop("not_finite")
        ]
        written = False
        if distributed.rank() in culprits[:RANKS_WITH_IMAGES]:
            name = images_of(distributed.rank())
            with written_or_logged(folder / name):
                self._setting.must_own()
                (part / name).write_bytes(safetensors.torch.save(_stored(evidence)))
                written = True
        with_images = [
            rank for rank, done in enumerate(distributed.gather_objects(written)) if done
        ]
        not_finite = [name for name, value in evidence.maxima.items() if not math.isfinite(value)]
        self._incident = {
            **asdict(update),
            "off": [asdict(finding) for finding in self._findings],
            "restored": None,
            "world_size": self._setting.world_size,
            "micro_batch_size": self._setting.micro_batch_size,
            "accumulation": self._setting.accumulation,
            "culprits": culprits,
            "images": [images_of(rank) for rank in with_images],
            "state_not_finite": self._broken,
            "first_layer_not_finite": not_finite[0] if not_finite else None,
            "layers": evidence.maxima,
            "ranks": ranks,
        }
        if not distributed.is_main():
            return
        with written_or_logged(folder):
            self._setting.must_own()
            write_json(part / INCIDENT, self._incident)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            _drop_old_images(self._incidents)
        log.warning("%s", _in_words(self._incident, self._findings, folder))

    def after_update(self, update: Update) -> Verdict | None:
        """Counts refusals, and requests a roll-back after too many in a row, or the run's end."""
        self._past.add(update.index, update.loss, update.grad_norm, skipped=update.skipped)
        past, limits = self._past, self._limits
        broken = update.skipped and bool(self._broken)
        if len(past.refused) < limits.skips and not broken:
            return None
        # After a broken state at the last step there is no step to go on with; the next start
        # repeats the steps since the last checkpoint.
        count = len(past.roll_backs)
        if count < limits.roll_backs and not (
            broken and update.index + 1 == self._setting.total_updates
        ):
            return Verdict(roll_back=past.at_most)
        if distributed.is_main():
            log.error(
                "guard: the run ends: %s, after %d roll-back%s (--guard.roll_backs)."
                " See what %s says and start the same command again, or anew "
                "with a lower --optim.base_lr.",
                f"its state is not finite at step {update.index + 1}"
                if broken
                else f"steps {past.refused[0] + 1} to {update.index + 1} were refused one after "
                "the other",
                count,
                "" if count == 1 else "s",
                self._incidents,
            )
        return Verdict(stop=GUARD)

    def on_roll_back(self, update: Update, restored: int) -> None:
        """Forgets the abandoned steps, and records the roll-back for a resume."""
        roll_backs = {**self._past.roll_backs, update.index: restored}
        refused = len(self._past.refused)
        folder = of_step(self._incidents, update.index + 1)
        self._incident["restored"] = restored
        if distributed.is_main():
            with written_or_logged(folder / INCIDENT):
                self._setting.must_own()
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / INCIDENT, self._incident)
            log.warning(
                "guard: %s: weights and moments are those of %d steps "
                "again, and the run goes on with the next data (roll-back %d of %d)",
                "the state is not finite" if self._broken else f"{refused} refused in a row",
                restored,
                len(roll_backs),
                self._limits.roll_backs,
            )
        self._past = self._read(restored)
        # Earlier refusals do not count for the steps that follow. The roll-back is set here, since
        # its incident may not have been written.
        self._past.refused.clear()
        self._past.roll_backs, self._past.restored = roll_backs, restored

    def _read(self, updates: int) -> _Past:
        """Returns the memory after the first `updates` steps of the run, the same on every rank."""
        past: _Past | None = None
        if distributed.is_main():
            rows = rows_before(self._setting.folder / METRICS, updates)
            past = past_of(rows, roll_backs_of(self._incidents))
        return cast(_Past, distributed.broadcast_object(past))


def culprits_of(losses: list[list[float]]) -> list[int]:
    """Returns the ranks with a non-finite loss, or else the rank with the largest loss."""
    bad = [rank for rank, values in enumerate(losses) if not all(map(math.isfinite, values))]
    return bad or [max(range(len(losses)), key=lambda rank: max(losses[rank], default=-math.inf))]


def images_of(rank: int) -> str:
    """Returns the name of the file of a rank's images."""
    return f"rank_{rank:05d}.safetensors"


def _stored(evidence: Evidence) -> dict[str, Tensor]:
    """Returns a rank's images as one tensor, with smaller micro batches padded with black.

    `sizes` has the height and width of each micro batch, (micro batches, 2).
    """
    sizes = torch.tensor([images.shape[-2:] for images in evidence.images])
    height, width = sizes.amax(0).tolist()
    padded = [
        functional.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        for images in evidence.images
    ]
    return {"images": torch.cat(padded), "positions": evidence.positions, "sizes": sizes}


def _in_words(incident: dict[str, Any], abnormal: list[Finding], folder: Path) -> str:
    why = " and ".join(finding.in_words() for finding in abnormal) or "the step was refused"
    rank = incident["culprits"][0]
    more = f" and {n} more" if (n := len(incident["culprits"]) - 1) else ""
    layer = incident["first_layer_not_finite"]
    where = f"; {layer} is the first layer that is not finite" if layer else ""
    host = incident["ranks"][rank]["host"]
    if broken := incident["state_not_finite"]:
        first = broken[0]
        others = f", and {len(broken) - 1} more," if len(broken) > 1 else ""
        where += f"; {first['kind']} of {first['tensor']} on rank {first['rank']}{others} "
        where += "is not finite"
    return (
        f"guard: step {incident['index'] + 1} skipped: {why}; worst on rank {rank}{more} ({host})"
        f"{where}; python -m fd_large replay {folder}"
    )


def _index(folder: Path) -> int:
    return int(folder.name.removeprefix(STEP)) - 1


def _folders(incidents: Path) -> list[Path]:
    """Returns the complete incidents, oldest first."""
    return sorted(p for p in incidents.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdigit())


def _set_aside(incidents: Path, first_update: int) -> None:
    """Renames incidents of steps that will run again, since they may not recur."""
    for folder in _folders(incidents):
        if _index(folder) >= first_update:
            with written_or_logged(folder):
                aside = folder.with_name(f"superseded_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)


def roll_backs_of(incidents: Path) -> dict[int, int]:
    """Returns {step of a roll-back (from 0): step of the restored state}."""
    roll_backs = {}
    for folder in _folders(incidents):
        try:
            restored = read_json(folder / INCIDENT, holds=dict)["restored"]
        except (FDError, KeyError) as error:
            log.warning("%s: cannot be read: %s", folder / INCIDENT, error)
            continue
        if isinstance(restored, int):
            roll_backs[_index(folder)] = restored
    return roll_backs


def _drop_old_images(incidents: Path) -> None:
    with_images = [folder for folder in _folders(incidents) if any(folder.glob("*.safetensors"))]
    for folder in with_images[: max(0, len(with_images) - INCIDENTS_WITH_IMAGES)]:
        for path in folder.glob("*.safetensors"):
            path.unlink()
