"""What `replay` prints of a refused step, and its exit codes."""

from __future__ import annotations

import math
import re

import pytest
import tiny_runs
import torch

from fd_large.cli.main import main

IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


@pytest.fixture
def incident(tmp_path):
    run = tiny_runs.tiny_run()
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path, run, task, update=5)
    return tiny_runs.store_incident(tmp_path, 9, list(IMAGES.split(1)), [math.nan, 0.25])


def test_losses_and_where_the_weights_are_from(incident, capsys):
    assert main(["replay", str(incident)]) == 0
    shown = capsys.readouterr().out
    assert f"step 10 of {incident.parents[2]}" in shown
    assert "loss nan" in shown
    assert "checkpoint of 5 steps" in shown
    assert re.search(r"rank 0: loss nan ! recorded, 0\.\d+ now; \S*140", shown)
    assert re.search(r"rank 0: loss 0\.25 recorded, 0\.\d+ now; \S*141", shown)
    assert re.search(r"gradient norm \S+ recorded, \d\S* now", shown)
    assert "ANOTHER TRAINING" in shown


def test_a_mistake_ends_with_2(incident, capsys):
    assert main(["replay"]) == 2
    assert "FILE" in capsys.readouterr().err
    assert main(["replay", str(incident.parents[2])]) == 2
    assert "incident not found" in capsys.readouterr().err
