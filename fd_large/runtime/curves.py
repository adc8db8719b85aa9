"""Base classes of trackers with curves: names of curves, and calls in a thread for networks.

Points are drawn at the number of finished steps, as on the progress bar: a training row at its own
step + 1, and an evaluation at the number of steps before it.
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
"""Seconds for which the end of a run waits for points that are not sent yet."""

_keeping = threading.Lock()


class Curves(Tracker):
    """Turns every metric of a run into a curve; a subclass sends or writes them."""

    def on_start(self, setting: Setting) -> None:
        """Records the sets of metrics, and the evaluation that a resumed run may repeat."""
        self._sets = [key.split("/")[0] for key in setting.metrics if "/" in key]
        # The last evaluation before a resume may be made again.
        self._seam = first = setting.first_update
        self._at_seam: set[str] = set()
        for row in rows_before(setting.folder / EVALUATIONS, first + 1):
            if first and row["update"] == first:
                self._at_seam |= row.keys()

    def on_rows(self, rows: list[Row]) -> None:
        """Adds a point for each row."""
        for row in rows:
            self.add({tag: row[k] for k, tag in TAGS.items() if k in row}, row["update"] + 1)

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Adds a point for each metric, under SET/METRIC."""
        values = {}
        for name, value in metrics.items():
            if not (index == self._seam and name in self._at_seam):
                group = next((s for s in self._sets if name.startswith(f"{s}_")), "evaluation")
                values[f"{group}/{name.removeprefix(f'{group}_')}"] = value
        if values:
            self.add(values, index)

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each of the given curves."""
        raise NotImplementedError


class RemoteCurves(Curves):
    """Curves in a service that may be slow or unreachable.

    A separate thread makes the calls, in order, so that training never waits. After the first
    failed call there is one warning, and further calls are skipped. The id of the service's run
    is kept in RUN/trackers.json, so that a resumed run continues in it.

    Attributes:
        name: Name in the recipe, and also of this package's extra and of the library's module.
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
        """Begins or continues the service's run."""
        super().on_start(setting)
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._failed = False
        # A daemon: a service that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()
        self._calls.put(("begin", (setting, _recipe(setting), _ids(setting).get(self.name))))

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each of the given curves."""
        self._calls.put(("send", (values, step)))

    def on_end(self, status: str) -> None:
        """Sends the remaining points, within a time limit."""
        self._calls.put(("finish", (status,)))
        self._calls.put(None)
        self._thread.join(SECONDS_TO_FINISH)
        if self._thread.is_alive():
            log.warning(
                "%s does not answer: its last points are missing there; RUN/metrics.jsonl has all",
                self.name,
            )

    def begin(self, setting: Setting, recipe: dict[str, Any], known: str | None) -> None:
        """Opens the service's run and keeps its id by `keep`; the thread calls it.

        Args:
            setting: The run.
            recipe: Content of recipe.json, without secrets.
            known: Id of the service's run to continue, or None for a new run.
        """
        raise NotImplementedError

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends a point for each of the given curves."""
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """Closes the service's run with the status of this one."""
        raise NotImplementedError

    def keep(self, setting: Setting, id: str) -> None:
        """Stores the id of the service's run in the run's folder."""
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
    """Returns the name of the run in a service: `runtime.name`, else the folder's name."""
    return recipe["runtime"].get("name") or setting.folder.resolve().name


def _recipe(setting: Setting) -> dict[str, Any]:
    return masked(read_json(setting.folder / RECIPE, holds=dict))


def _ids(setting: Setting) -> dict[str, str]:
    return json_object(setting.folder / "trackers.json")
