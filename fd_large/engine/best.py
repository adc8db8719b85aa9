"""Finds the best evaluation of a run so far, and decides whether the run stops early.

The state follows from the lines of evaluations.jsonl up to the present step, so that a resumed run
decides like an uninterrupted run. All ranks use rank 0's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.recipes.file_names import EVALUATIONS
from fd_large.runtime.run_folder import rows_before

FIELD = "eval.best_metric"


class Best:
    """Compares evaluations by one metric.

    The evaluation before the first step is not counted, because it has no checkpoint.

    Args:
        metric: Name of the number, as in evaluations.jsonl.
        lower_is_better: Whether a lower metric is better.
        patience: Number of consecutive evaluations without a better value after which the run is to
            stop early; 0 if the run is never to stop early.
        values: {finished steps: value} of the evaluations so far.
    """

    def __init__(
        self,
        metric: str,
        *,
        lower_is_better: bool,
        patience: int = 0,
        values: Mapping[int, float] | None = None,
    ) -> None:
        self.metric, self._sign, self._patience = metric, 1 if lower_is_better else -1, patience
        self._values: dict[int, float] = {}
        for step, value in sorted((values or {}).items()):
            self._values[step] = value

    @classmethod
    def of_folder(
        cls, folder: Path, finished: int, *, metric: str, lower_is_better: bool, patience: int
    ) -> Best:
        """Returns a `Best` with a run's evaluations up to `finished` steps, read from its folder.

        All ranks must call this method. Later evaluations in the folder are left out.
        """
        values: dict[int, float] = {}
        if distributed.is_main():
            rows = rows_before(folder / EVALUATIONS, finished + 1)
            values = {row["update"]: row[metric] for row in rows if row.get(metric) is not None}
            values.pop(0, None)
        values = distributed.broadcast_object(values)
        return cls(metric, lower_is_better=lower_is_better, patience=patience, values=values)

    def note(self, step: int, metrics: Mapping[str, float], *, all_made: bool) -> bool:
        """Records the numbers of an evaluation; returns whether this evaluation is the best so far.

        All ranks must call this method; the numbers of rank 0 count. The result is False if
        `metrics` lacks the metric, or if the evaluation was made before the first step.

        Args:
            step: Number of finished steps.
            metrics: The numbers, by name.
            all_made: Whether `metrics` has the numbers of every evaluation that the run makes.

        Raises:
            ConfigError: On all ranks, if `all_made` is True and `metrics` has other numbers but not
                the metric, so that the run would never measure it.
        """
        value = distributed.broadcast_object(metrics.get(self.metric))
        if value is None:
            if all_made and metrics:
                error = ConfigError(
                    f"{FIELD}: this run has no such metric; got {self.metric!r}, expected one of "
                    f"{', '.join(metrics)}. Change --{FIELD}, or set the images that it needs "
                    "(--eval.root, --eval.knn_root)."
                )
                error.agreed = True
                raise error
            return False
        if not step:
            return False
        self._values[step] = value
        return self.step == step

    @property
    def step(self) -> int | None:
        """Step of the best evaluation, the earliest of equal ones; None if no value is finite."""
        finite = {step: value for step, value in self._values.items() if math.isfinite(value)}
        return min(finite, key=lambda step: (self._sign * finite[step], step), default=None)

    @property
    def exhausted(self) -> bool:
        """Whether `patience` or more evaluations followed the best; False if `patience` is 0.

        If no evaluation had a finite value, all evaluations so far are counted.
        """
        since = sum(step > (self.step or 0) for step in self._values)
        return bool(self._patience) and since >= self._patience

    def reason(self) -> str:
        """Returns why the run stops early: the number of evaluations without a better value."""
        step = self.step
        value = "not finite" if step is None else f"{self._values[step]:.6g} at step {step}"
        return (
            f"early stopping: {self._patience} evaluations without a better {self.metric} than "
            f"{value}"
        )

    def to_dict(self) -> dict[str, Any] | None:
        """Returns the best evaluation for summary.json, or None if no value is finite."""
        step = self.step
        if step is None:
            return None
        return {"metric": self.metric, "value": self._values[step], "update": step}
