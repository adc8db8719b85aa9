"""Tracker that sends curves to MLflow.

The curves go to the server of MLFLOW_TRACKING_URI, or, if this variable is not set, to the folder
`mlruns` next to the run's folder.
"""

from __future__ import annotations

import os
import time
from typing import Any

from fd_large.recipes.fields import flat_plain
from fd_large.runtime.curves import RemoteCurves, run_name
from fd_large.runtime.hooks import DONE, PREEMPTED, Setting

STATUS = {DONE: "FINISHED", PREEMPTED: "KILLED"}
"""Status of a run in MLflow, by its status in this package; other statuses become FAILED."""


class MLflow(RemoteCurves):
    """Tracker with a run in MLflow.

    The run is in the experiment that the environment variable MLFLOW_EXPERIMENT_NAME names; without
    the variable, in the experiment `fd_large`.
    """

    name, package = "mlflow", "mlflow-skinny"

    def begin(self, setting: Setting, recipe: dict[str, Any], known: str | None) -> None:
        """Opens the run in MLflow; a new run gets the recipe's fields as its parameters.

        Args:
            setting: The facts of this run.
            recipe: Contents of recipe.json, without secrets.
            known: ID of the run in MLflow to continue, or None for a new run.
        """
        # A server that does not answer is given up after a minute, not after many.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        beside = (setting.folder.resolve().parent / "mlruns").as_uri()
        self._client = client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or beside)
        # The last step that a resumed run already has, by curve.
        self._known: dict[str, int] = {}
        self._resumed = known is not None
        if known is not None:
            client.update_run(known, status="RUNNING")
            self._run = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fd_large"
        named = client.get_experiment_by_name(name)
        experiment = named.experiment_id if named else client.create_experiment(name)
        tags = dict.fromkeys(recipe["runtime"].get("tags", ()), "")
        run = client.create_run(experiment, run_name=run_name(setting, recipe), tags=tags)
        self._run = run.info.run_id
        self.keep(setting, self._run)
        settings = [Param(key, str(value)) for key, value in flat_plain(recipe).items()]
        for start in range(0, len(settings), 100):  # A call takes at most 100.
            client.log_batch(self._run, params=settings[start : start + 100])

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends one point for each curve that `values` names, unless the curve already has it.

        After a resume, a curve may already have a point at `step` or a later step; it then gets
        none.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        new = [Metric(k, float(v), now, step) for k, v in values.items() if step > self._last(k)]
        if new:
            self._client.log_batch(self._run, metrics=new)

    def finish(self, status: str) -> None:
        """Closes the run in MLflow with the status in MLflow's words that corresponds to `status`.

        If no words correspond to `status`, MLflow's status is FAILED.
        """
        self._client.set_terminated(self._run, STATUS.get(status, "FAILED"))

    def _last(self, curve: str) -> int:
        if not self._resumed:
            return -1
        if curve not in self._known:
            points = self._client.get_metric_history(self._run, curve)
            self._known[curve] = max((point.step for point in points), default=-1)
        return self._known[curve]
