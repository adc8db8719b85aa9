"""Runs that follow each other in one process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from fd_large.errors import ConfigError, Exit
from fd_large.evaluation import recorded_runs
from fd_large.evaluation.recorded_runs import RecordedRun
from fd_large.recipes import registry
from fd_large.runtime.preemption import Preemption


@pytest.mark.parametrize("asked", [False, True])
def test_no_run_follows_one_that_was_asked_to_stop_while_it_ended(tmp_path, asked):
    run = registry.get("quickstart")
    run = replace(run, runtime=replace(run.runtime, run_dir=str(tmp_path)))

    def finished(run, *, deepspeed_config):
        hook = Preemption(60, ends_process=False)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        hook.close()
        (tmp_path / "summary.json").write_text('{"steps": 3}')
        return 0

    before = signal.getsignal(signal.SIGTERM)
    try:
        code, summary = recorded_runs.train(run, "zero1", finished)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, summary) == (Exit.AGAIN if asked else Exit.DONE, {"steps": 3})


def test_a_record_of_another_recipe_without_a_training_is_replaced(tmp_path):
    run = registry.get("quickstart")
    run = replace(run, runtime=replace(run.runtime, run_dir=str(tmp_path)))
    other = replace(run, optim=replace(run.optim, max_steps=7))
    first, second = (RecordedRun("cell.json", "a training", r, {}) for r in (run, other))
    first.write(failure="it does not fit")
    assert first.read()["failure"] == "it does not fit"
    assert second.read() == {}
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ConfigError, match="another recipe"):
        second.read()
