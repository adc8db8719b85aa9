"""Base classes of trackers that draw curves, on disk or in a service on the network.

The x coordinate of a point is the number of finished steps, as on the progress bar. So the point of
a training step is at the step's index + 1, and the point of an evaluation is at the number of steps
before it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fd_large.errors import ConfigError, first_line, masked
from fd_large.files import json_object, read_json, write_json
from fd_large.recipes.file_names import EVALUATIONS, RECIPE
from fd_large.runtime.hooks import Row, Setting, Tracker
from fd_large.runtime.logs import FILE_ONLY
from fd_large.runtime.run_folder import rows_before

log = logging.getLogger(__name__)

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "images_per_second": "speed/images_per_second",
    "tflops_per_gpu": "speed/tflops_per_gpu",
    "mfu": "speed/mfu",
    "hardware_utilisation": "speed/hardware_utilisation",
    "data_wait": "speed/data_wait",
    "memory_bytes": "memory/rank_0_peak_bytes",
}
SECONDS_TO_FINISH = 30.0
"""Largest number of seconds for which a run waits at its end until all points are sent."""

_keeping = threading.Lock()


class Curves(Tracker):
    """Base class of trackers that turn each metric of a run into a curve.

    A subclass defines `add`, which sends or writes the points.
    """

    def on_start(self, setting: Setting) -> None:
        """Reads the groups of metrics, and which metrics the last evaluation before a resume has.

        A resumed run may repeat this evaluation.

        Args:
            setting: The facts of the run.
        """
        self._sets = [key.split("/")[0] for key in setting.metrics if "/" in key]
        # The last evaluation before a resume may be made again.
        self._seam = first = setting.first_update
        self._at_seam: set[str] = set()
        for row in rows_before(setting.folder / EVALUATIONS, first + 1):
            if first and row["update"] == first:
                self._at_seam |= row.keys()

    def on_rows(self, rows: list[Row]) -> None:
        """Adds a point to each curve of training for each of `rows`, rows of metrics.jsonl."""
        for row in rows:
            self.add({tag: row[k] for k, tag in TAGS.items() if k in row}, row["update"] + 1)

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Adds a point for each metric of an evaluation, to the curve GROUP/METRIC.

        After a resume, the run may repeat the last evaluation; metrics that this evaluation already
        has are left out.

        Args:
            index: Number of finished steps.
            metrics: {name: value} of the evaluation.
        """
        values = {}
        for name, value in metrics.items():
            if not (index == self._seam and name in self._at_seam):
                group = next((s for s in self._sets if name.startswith(f"{s}_")), "evaluation")
                values[f"{group}/{name.removeprefix(f'{group}_')}"] = value
        if values:
            self.add(values, index)

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds one point to each curve that `values` names.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        raise NotImplementedError


class RemoteCurves(Curves):
    """Base class of trackers for a service on the network, which may be slow or unreachable.

    A separate thread calls the service, in order, so that training never waits. The first failed
    call is logged as a warning, and further calls are skipped. The ID of the run in the service is
    kept in RUN/trackers.json, so that a resumed run continues the same run there.

    Attributes:
        name: Name of the tracker in the recipe, such as "wandb". The module of the service's
            library has the same name.
        package: Name of the library for `pip install`.
    """

    name: str
    package: str

    def __init__(self) -> None:
        spec = find_spec(self.name)
        # A folder of that name, in which the library keeps a run's files, is not the library.
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"runtime.trackers: {self.name} needs its library; got no package {self.package}, "
                f"expected it to be installed. Run: pip install {self.package}"
            )

    def on_start(self, setting: Setting) -> None:
        """Starts the thread, which begins or continues the run in the service.

        Args:
            setting: The facts of the run.
        """
        super().on_start(setting)
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._failed = False
        # A daemon: a service that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()
        self._calls.put(("begin", (setting, _recipe(setting), _ids(setting).get(self.name))))

    def add(self, values: dict[str, float], step: int) -> None:
        """Queues one point for each curve that `values` names; the thread sends the points.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        self._calls.put(("send", (values, step)))

    def on_end(self, status: str) -> None:
        """Makes the thread send the remaining points and close the run in the service.

        Waits for this at most `SECONDS_TO_FINISH` seconds, and logs a warning if they do not
        suffice.

        Args:
            status: Status of the run.
        """
        self._calls.put(("finish", (status,)))
        self._calls.put(None)
        self._thread.join(SECONDS_TO_FINISH)
        if self._thread.is_alive():
            log.warning(
                "%s does not answer and lacks the last points; RUN/metrics.jsonl has all points",
                self.name,
            )

    def begin(self, setting: Setting, recipe: dict[str, Any], known: str | None) -> None:
        """Opens the run in the service, and stores the run's ID by `keep`.

        The thread calls this method.

        Args:
            setting: The facts of this run.
            recipe: Contents of recipe.json, without secrets.
            known: ID of the run in the service to continue, or None for a new run.
        """
        raise NotImplementedError

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends one point for each curve that `values` names to the service.

        The thread calls this method.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """Closes the run in the service; the thread calls this method.

        Args:
            status: Status of this run, such as "done".
        """
        raise NotImplementedError

    def keep(self, setting: Setting, id: str) -> None:
        """Stores `id`, the ID of the run in the service, in trackers.json in the run's folder.

        Raises:
            OSError: if the folder is gone or another launch of the run owns it, or if the file
                cannot be written.
        """
        setting.must_own()
        with _keeping:
            write_json(setting.folder / "trackers.json", {**_ids(setting), self.name: id})

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failed:
                continue
            method, arguments = call
            try:
                getattr(self, method)(*arguments)
            except Exception as error:  # A service may fail in any way.
                self._failed = True
                log.warning("%s gets no further points: %s", self.name, first_line(error))
                log.info("its error:", exc_info=True, extra=FILE_ONLY)


def run_name(setting: Setting, recipe: Mapping[str, Any]) -> str:
    """Returns the name for the run in a service.

    It is the field `runtime.name` of `recipe` if set, else the name of the run's folder.

    Args:
        setting: The facts of the run, with its folder.
        recipe: Contents of recipe.json.
    """
    return recipe["runtime"].get("name") or setting.folder.resolve().name


def _recipe(setting: Setting) -> dict[str, Any]:
    return masked(read_json(setting.folder / RECIPE, holds=dict))


def _ids(setting: Setting) -> dict[str, str]:
    return json_object(setting.folder / "trackers.json")
