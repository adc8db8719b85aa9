"""Measured seconds of the phases of a real step on one device, for any micro-batch size.

`engine/counting/phases.py` times a task's own step at two micro-batch sizes. The seconds are taken
to be linear in the number of images (docs/scaling.md compares predictions with measured steps).
What only several ranks need (copies, hooks, collectives) is not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError
from fd_large.files import read_json
from fd_large.plan.counts import Line

FIRST_PASS, FORWARD, BACKWARD = "first pass", "forward", "backward"
TRAINED = (FIRST_PASS, FORWARD, BACKWARD)
"""Names of the student's phases. Any other phase is the forward of a frozen model, by its name."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Measured seconds of the phases of a task's step on one device.

    Attributes:
        seconds: Seconds of each phase in a micro-batch, as a linear function of the number of
            images, by name of the phase.
        update: Seconds that the gradient norm, clipping and the optimiser's step, all in float32,
            take for each parameter.
        images: The only micro-batch size for which `seconds` is valid; 0 if it is valid for all.
    """

    seconds: Mapping[str, Line]
    update: float
    images: int = 0

    def at(self, images: int, *, first_pass: bool, again: float) -> dict[str, float]:
        """Returns the seconds of each phase of a micro-batch.

        Args:
            images: Number of images in the micro-batch.
            first_pass: Whether the step is in two passes, of which the first computes sums over
                all micro-batches.
            again: Part of the forward pass that is recomputed in the backward pass, as a fraction
                of its seconds. If it is above 0, the result has an entry "forward again".
        """
        seconds = {
            name: line.fixed + line.each * images
            for name, line in self.seconds.items()
            if name != FIRST_PASS or first_pass
        }
        if again:
            seconds["forward again"] = again * seconds[FORWARD]
        return seconds

    def to_plain(self) -> dict[str, Any]:
        """Returns the fields as a dict that `json.dumps` accepts, for `from_plain`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_plain(cls, plain: Any, *, where: str) -> Phases:
        """Returns the phases from a dict that `to_plain` returned.

        Args:
            plain: The dict, after it was stored as JSON and loaded.
            where: Name of the file, for messages.

        Raises: ConfigError: if `plain` is not a valid result of `to_plain`.
        """
        try:
            seconds = {
                str(name): Line(float(fixed), float(each))
                for name, (fixed, each) in plain["seconds"].items()
            }
            return cls(seconds=seconds, update=float(plain["update"]), images=int(plain["images"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: phases: not written by --probe; got {error!r}, expected the seconds of "
                "each phase, fixed and per image. Measure the phases again."
            ) from None


def read(file: str, key: str) -> Phases | None:
    """Reads the phases of a task from a file of measured rates.

    Args:
        file: JSON written by `plan --probe --rates`, or another file of rates.
        key: The key of the task in the file's object `phases`.

    Returns: the phases, or None if the file has no phases of the task.
    Raises: ConfigError: if the entry is not valid.
    """
    of_tasks = read_json(Path(file), where="--rates", holds=dict).get("phases", {})
    if not isinstance(of_tasks, dict) or key not in of_tasks:
        return None
    return Phases.from_plain(of_tasks[key], where=f"--rates: {file}")


def line(seconds: Mapping[int, float]) -> Line:
    """Returns the linear function with the measured seconds at two micro-batch sizes.

    Neither of its terms is negative. With a single measurement, or if the fixed term would be
    negative, the seconds are proportional to the number of images.

    Args:
        seconds: Measured seconds, by number of images in the micro-batch.
    """
    large = max(seconds)
    small = min(seconds)
    each = max(0.0, (seconds[large] - seconds[small]) / (large - small)) if small < large else 0.0
    fixed = seconds[large] - each * large
    if small == large or fixed < 0:
        return Line(0.0, seconds[large] / large)
    return Line(fixed, each)


def of_students(each: Sequence[Phases], parameters: Sequence[int]) -> Phases:
    """Returns the phases of several students that train together on the same teachers' outputs.

    Args:
        each: The phases of each student alone, with the same frozen models.
        parameters: Number of trained parameters of each student, by which `update` is averaged.
    """
    first, *others = each
    seconds = dict(first.seconds)
    for other in others:
        for name in TRAINED:
            if name in other.seconds:
                seconds[name] = seconds.get(name, Line(0.0, 0.0)) + other.seconds[name]
    return Phases(
        seconds=seconds,
        update=sum(n * phases.update for n, phases in zip(parameters, each, strict=True))
        / sum(parameters),
        images=first.images,
    )
