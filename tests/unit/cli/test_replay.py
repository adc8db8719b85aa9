"""What `replay` prints of a refused step, and its exit codes."""

from __future__ import annotations

import math
import re

import pytest
import tiny_runs
import torch

from fd_large.cli.main import main
from fd_large.engine import replay

IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


@pytest.fixture
def incident(tmp_path):
    run = tiny_runs.tiny_run()
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path, run, task, update=5)
    return tiny_runs.store_incident(tmp_path, 9, list(IMAGES.split(1)), [math.nan, 0.25])


def test_losses_layers_and_where_the_weights_are_from(incident, capsys):
    assert main(["replay", str(incident)]) == 0
    shown = capsys.readouterr().out
    assert f"step 10 of {incident.parents[2]}" in shown
    assert "loss nan" in shown
    assert "checkpoint of 5 steps" in shown
    # Rank, micro batch, recorded loss, loss now, images.
    assert re.search(r"0 \D+ 0 \D+ nan ! \D+ 0\.\d+ \D+ 140 ", shown)
    assert re.search(r"0 \D+ 1 \D+ 0\.25 \D+ 0\.\d+ \D+ 141 ", shown)
    assert "NOT THE TRAINING" in shown
    assert shown.count("finite at every layer") == 2


def test_the_first_layer_that_is_not_finite(incident, capsys, monkeypatch):
    run_again, layers = replay.run_again, []

    def spoilt(incident, weights):
        found = run_again(incident, weights)
        layers.extend(found.forward)
        found.forward[layers[3]] = found.forward[layers[5]] = math.inf
        found.gradient["projection"] = found.gradient["student.norm"] = math.nan
        return found

    monkeypatch.setattr(replay, "run_again", spoilt)
    assert main(["replay", str(incident.parent)]) == 0
    shown = capsys.readouterr().out
    assert f"forward: {layers[3]} is the first" in shown
    # Backward meets the last layer first.
    assert "gradient: projection is the first" in shown
    assert "inf !" in shown


def test_a_mistake_ends_with_2(incident, capsys):
    assert main(["replay"]) == 2
    assert "FILE" in capsys.readouterr().err
    assert main(["replay", str(incident.parents[2])]) == 2
    assert "no incident" in capsys.readouterr().err
