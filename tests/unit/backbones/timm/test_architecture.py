"""What is known of a model of timm without timm."""

from __future__ import annotations

import json
from pathlib import Path

import timm

from fd_large.backbones.timm.architecture import why_refused

COUNTED = Path(__file__).parents[4] / "benchmarks/results/timm_models.json"


def test_lists_say_of_the_models_that_were_counted_who_has_no_map():
    counted = json.loads(COUNTED.read_text())["refused"].values()
    told = {name: reason for name in timm.list_models() if (reason := why_refused(name))}
    without_map = {name for name, reason in told.items() if reason.startswith("refused")}
    assert without_map == {name for names in counted for name in names}
    assert {name.rpartition("_")[2] for name in told.keys() - without_map} == {"sapiens2"}
