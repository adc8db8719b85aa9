"""Refuses steps with an abnormal loss or gradient norm, and rolls a run back after several.

A run with a non-finite state (weights or moments) is rolled back at once, since no later step could
be accepted or saved. If no step is accepted after a roll-back, the next roll-back goes further
back.

A number is abnormal if it is NaN or infinite, or lies above the median of the last accepted steps
by more than a multiple of their spread. The spread is the median distance from the median, so that
a spike does not enlarge it, and it has a lower limit for flat curves. The guard's state follows
from RUN/metrics.jsonl and RUN/incidents alone, so that a resumed run decides like an uninterrupted
run.
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
"""Number of the last accepted steps over which median and spread are taken."""
KNOWN = 20
"""Number of accepted steps from which on a finite number can be abnormal."""
LOSS_FLOOR, NORM_FLOOR = 0.05, 0.25
"""Lower limits of the spread. The limit of the loss is a fraction of the median loss, and the limit
of the gradient norm is in natural logarithms."""
NAMED = 5
"""Largest number of non-finite tensors that an incident names for each rank."""
INCIDENTS_WITH_IMAGES, RANKS_WITH_IMAGES = 20, 4
"""Number of the newest incidents whose images are kept, and the largest number of ranks whose
images an incident has."""
MAD_TO_DEVIATION = 1.4826  # Exact for a normal distribution.

Values = tuple[int, float, float]
"""Index, loss and gradient norm of a step."""


@dataclass(frozen=True)
class Finding:
    """An abnormal loss or gradient norm of a step.

    Attributes:
        what: "loss" or "gradient norm".
        value: The loss or gradient norm of the step.
        median: Median of the same number over the last accepted steps; None without such steps.
        limit: Largest normal value; None while there are fewer than `KNOWN` accepted steps.
        spread: 1.4826 times the median absolute deviation of the loss, or of the natural logarithm
            of the gradient norm, over the last accepted steps, with a lower limit; None if `median`
            is None.
    """

    what: str
    value: float
    median: float | None
    limit: float | None
    spread: float | None

    def in_words(self) -> str:
        """Returns a clause for messages, such as "its loss is nan"."""
        if not math.isfinite(self.value):
            usual = "" if self.median is None else f" (median so far {self.median:.4g})"
            return f"its {self.what} is {self.value:g}{usual}"
        return (
            f"its {self.what} is {self.value:.4g}, far above the median {self.median:.4g} "
            f"(limit {self.limit:.4g})"
        )


def findings(update: Update, accepted: Iterable[Values], spread: float) -> list[Finding]:
    """Returns the abnormal numbers of a step, at most its loss and its gradient norm.

    Args:
        update: The step to judge.
        accepted: The last `WINDOW` accepted steps before this step, oldest first.
        spread: Largest normal distance above the median of the accepted steps, as a multiple of
            their spread.
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
    """Returns a finding if a number is abnormal, else None.

    Args:
        name: "loss" or "gradient norm".
        value: The number to judge.
        known: The same number in the last accepted steps.
        allowed: Largest normal distance above the median of `known`, as a multiple of the spread.
        factors: Whether median and spread are computed from logarithms of the numbers, as for the
            gradient norm, which varies by factors.
    """
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
    """What the guard knows about earlier steps.

    A step that the guard skipped is called refused, any other step accepted.

    Attributes:
        accepted: The last accepted steps from which the current weights resulted.
        refused: Indices of the refused steps since the last accepted step or roll-back.
        roll_backs: For each index (from 0) of a step after which the run was rolled back, the
            number of finished steps of the restored state.
        restored: Number of finished steps of the state that the last roll-back restored; None if
            there was no roll-back or a step was accepted since.
    """

    accepted: deque[Values]
    refused: list[int]
    roll_backs: dict[int, int]
    restored: int | None = None

    @property
    def at_most(self) -> int:
        """Largest number of finished steps of a state that the next roll-back may restore.

        If no step was accepted after the last roll-back, it is below the number that this roll-back
        restored. Otherwise it is the number of steps before the first refused step.
        """
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
    """Returns what the guard knows after the steps in `rows`.

    Args:
        rows: Rows of metrics.jsonl, in order.
        roll_backs: For each index (from 0) of a step after which the run was rolled back, the
            number of finished steps of the restored state.
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
    """Skips abnormal steps, rolls back after several in a row, and ends a run that stays abnormal.

    Each skipped step gets a folder in RUN/incidents. The folder has the abnormal numbers, the ranks
    with a non-finite loss (or else the rank with the largest loss), and images of a few of these
    ranks.

    Args:
        limits: The guard's settings in the recipe.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def on_start(self, setting: Setting) -> None:
        """Reads what the guard knows of the steps before a resume, from the run's folder.

        Incidents of steps that the run repeats are renamed.

        Args:
            setting: The facts of the run.
        """
        self._setting = setting
        self._incidents = setting.folder / INCIDENTS
        self._findings: list[Finding] = []
        self._broken: list[dict[str, Any]] = []
        self._incident: dict[str, Any] = {}
        if distributed.is_main():
            _set_aside(self._incidents, setting.first_update)
        self._past = self._read(setting.first_update)

    def judge(self, update: Update) -> Verdict:
        """Returns a verdict on the step `update`; the verdict skips an abnormal step.

        A step is abnormal if its loss or gradient norm is not finite or too far above the median of
        the last accepted steps.
        """
        self._broken = []
        self._findings = findings(update, self._past.accepted, self._limits.spread)
        return Verdict(skip=bool(self._findings))

    def on_skip(self, update: Update, evidence: Evidence) -> None:
        """Writes the step's folder in RUN/incidents, and logs the abnormal numbers.

        All ranks must call this method.

        Args:
            update: The numbers of the skipped step.
            evidence: This rank's images of the step, and what the models computed from them.
        """
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
        """Counts skipped steps, and decides whether the run is rolled back or ends.

        Args:
            update: The numbers of the step.

        Returns: a roll-back after too many skipped steps in a row or with a non-finite state; the
            end of the run if no roll-back is left; otherwise None.
        """
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
                " See the incidents in %s, and start the same command again, or a new run with a "
                "lower --optim.base_lr.",
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
        """Forgets the steps that were undone, and records the roll-back in the step's incident.

        Args:
            update: The last step before the roll-back.
            restored: Number of finished steps of the restored state.
        """
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
                "guard: %s: weights and moments are restored to those after %d steps, and the run "
                "continues with the next data (roll-back %d of %d)",
                "the state is not finite"
                if self._broken
                else f"{refused} steps were refused in a row",
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
        """Returns the skipped and accepted steps and the roll-backs in the first `updates` steps.

        The result is the same on every rank. Rank 0 reads it from the run's folder; all ranks must
        call this method.
        """
        past: _Past | None = None
        if distributed.is_main():
            rows = rows_before(self._setting.folder / METRICS, updates)
            past = past_of(rows, roll_backs_of(self._incidents))
        return cast(_Past, distributed.broadcast_object(past))


def culprits_of(losses: list[list[float]]) -> list[int]:
    """Returns the ranks with a non-finite loss; if there are none, the rank with the largest loss.

    Args:
        losses: For each rank the losses of its micro-batches.
    """
    bad = [rank for rank, values in enumerate(losses) if not all(map(math.isfinite, values))]
    return bad or [max(range(len(losses)), key=lambda rank: max(losses[rank], default=-math.inf))]


def images_of(rank: int) -> str:
    """Returns the name of the file in an incident's folder that holds the images of rank `rank`."""
    return f"rank_{rank:05d}.safetensors"


def _stored(evidence: Evidence) -> dict[str, Tensor]:
    """Returns the tensors about a rank's images in a skipped step that are written to a file.

    Args:
        evidence: The images of the rank in the skipped step, and what is known of them.

    Returns: `images`, (B, 3, H, W) uint8, where smaller micro-batches are padded with black at the
        right and below; `positions`, (B,) int64, the images' positions in the epoch's order; and
        `sizes`, (num_micro_batches, 2) int64, the height and width of each micro-batch in pixels.
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
        f"{where}; to repeat the step: python -m fd_large replay {folder}"
    )


def _index(folder: Path) -> int:
    return int(folder.name.removeprefix(STEP)) - 1


def _folders(incidents: Path) -> list[Path]:
    """Returns the folders of the incidents that are complete, oldest first.

    Args:
        incidents: The folder RUN/incidents.
    """
    return sorted(p for p in incidents.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdigit())


def _set_aside(incidents: Path, first_update: int) -> None:
    """Renames the incidents of steps that a resumed run repeats, since they may not recur.

    Args:
        incidents: The folder RUN/incidents.
        first_update: Index of the first step that the run repeats.
    """
    for folder in _folders(incidents):
        if _index(folder) >= first_update:
            with written_or_logged(folder):
                aside = folder.with_name(f"superseded_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)


def roll_backs_of(incidents: Path) -> dict[int, int]:
    """Reads the roll-backs of a run from `incidents`, its folder RUN/incidents.

    Returns: for each index (from 0) of a step after which the run was rolled back, the number of
        finished steps of the restored state; empty if the run was not rolled back.
    """
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
