"""Seconds of the phases of a real step, measured on one device, for any micro-batch.

`engine/counting/phases.py` times a task's own step at two micro-batches. Seconds are assumed
linear in the images (docs/scaling.md compares predictions with measured steps). Costs of several
ranks (copies, hooks, collectives) are not included.
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
"""Phases of the student; all others are forwards of frozen models, by name."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The phases of a task's step on one device.

    Attributes:
        seconds: Seconds of each phase of a micro-batch, linear in its images.
        update: Seconds of the optimiser for each parameter, in float32: norm, clipping, step.
        images: The only micro-batch for which the lines hold; 0 for all.
    """

    seconds: Mapping[str, Line]
    update: float
    images: int = 0

    def at(self, images: int, *, first_pass: bool, again: float) -> dict[str, float]:
        """Returns the seconds of each phase of a micro-batch.

        Args:
            images: Images of the micro-batch.
            first_pass: Whether a step has a first pass for its sums.
            again: Recomputation in backward, as a fraction of forward.
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
        """Returns the fields in a JSON-safe form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_plain(cls, plain: Any, *, where: str) -> Phases:
        """Returns the phases from the result of `to_plain`.

        Raises: ConfigError: if the values are invalid.
        """
        try:
            seconds = {
                str(name): Line(float(fixed), float(each))
                for name, (fixed, each) in plain["seconds"].items()
            }
            return cls(seconds=seconds, update=float(plain["update"]), images=int(plain["images"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: phases: not written by --probe; got {error!r}, expected seconds of each "
                "phase, as fixed and an image. Measure them again."
            ) from None


def read(file: str, key: str) -> Phases | None:
    """Returns the phases of a task in a file of measured rates, or None.

    Args:
        file: JSON written by `plan --probe --rates`, or another file of rates.
        key: The key of the task in the object `phases`.

    Raises: ConfigError: if the entry is not valid.
    """
    of_tasks = read_json(Path(file), where="--rates", holds=dict).get("phases", {})
    if not isinstance(of_tasks, dict) or key not in of_tasks:
        return None
    return Phases.from_plain(of_tasks[key], where=f"--rates: {file}")


def line(seconds: Mapping[int, float]) -> Line:
    """Returns the line through the seconds of two micro-batches; neither term is below 0.

    Args:
        seconds: Seconds by the images of a micro-batch; a single entry gives a line through 0.
    """
    large = max(seconds)
    small = min(seconds)
    each = max(0.0, (seconds[large] - seconds[small]) / (large - small)) if small < large else 0.0
    fixed = seconds[large] - each * large
    if small == large or fixed < 0:
        return Line(0.0, seconds[large] / large)
    return Line(fixed, each)


def of_students(each: Sequence[Phases], parameters: Sequence[int]) -> Phases:
    """Returns the phases of several students that train in step on one pass of frozen models.

    Args:
        each: The phases of each student alone, with the same frozen models.
        parameters: Number of trained parameters of each student, the weight of its update.
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
