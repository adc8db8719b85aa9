"""What is known of a model of timm without timm."""

from __future__ import annotations

import json
from pathlib import Path

import timm

from fd_large.backbones.timm.architecture import why_refused

COUNTED = Path(__file__).parents[4] / "benchmarks/results/timm_models.json"


def test_lists_say_of_the_models_that_were_counted_who_has_no_map():
    names = {
        name for names in json.loads(COUNTED.read_text())["refused"].values() for name in names
    }
    marked = {name for name in timm.list_models() if why_refused(name).startswith("refused")}
    assert marked == names
    assert why_refused("sapiens2_0_4b")
    assert not why_refused("resnet18")
