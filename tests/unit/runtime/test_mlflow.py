"""Curves in MLflow's files, read back by its client."""

from __future__ import annotations

import json

import pytest

from fd_large.runtime import curves
from fd_large.runtime.meter import Meter

pytest.importorskip("mlflow", reason="needs the package mlflow-skinny")


def test_a_run_and_the_same_run_after_a_restart(make_setting, run_updates, tmp_path, monkeypatch):
    from fd_large.runtime.mlflow import MLflow

    monkeypatch.setattr(curves, "SECONDS_TO_FINISH", 600.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "made up")
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    recipe = {"name": "r", "runtime": {"name": "mine", "tags": ["a"]}, "optim": {"base_lr": 0.1}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    setting = make_setting(folder=folder)
    run_updates([Meter([MLflow()])], setting, 8, evaluate=(4,), end="preempted")
    # The last checkpoint has five steps.
    run_updates([Meter([MLflow()])], make_setting(first=5, folder=folder), 10, evaluate=(7, 10))

    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "runs" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("made up")
    (run,) = client.search_runs([experiment.experiment_id])
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert "a" in run.data.tags
    assert run.data.params["optim.base_lr"] == "0.1"

    def curve(name):
        return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]

    assert curve("train/loss") == [(i + 1, pytest.approx(i / 100)) for i in range(10)]
    assert curve("held_out/loss") == [(4, 4.0), (7, 7.0), (10, 10.0)]
