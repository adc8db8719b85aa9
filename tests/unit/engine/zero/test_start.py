"""What DeepSpeed keeps between two engines."""

from __future__ import annotations

import sys
from pkgutil import resolve_name

import deepspeed
import pytest
import torch

from fd_large.engine.zero import private_names, start


def test_the_group_of_a_node_is_destroyed_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = private_names.get("deepspeed.utils:groups")
    node, destroyed = object(), []
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", node)
    monkeypatch.setattr(deepspeed.comm, "destroy_process_group", destroyed.append)
    start.forget_engines()
    assert destroyed == [node]
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    start.forget_engines()
    assert destroyed == [node]


def test_torchs_linear_function_comes_back(one_rank: None) -> None:
    own = torch.nn.functional.linear
    for _ in range(2):
        with deepspeed.zero.Init(dtype=torch.float32):
            torch.nn.Linear(2, 2)
        assert torch.nn.functional.linear is not own
        start.forget_engines()
        assert torch.nn.functional.linear is own


def test_a_process_may_have_no_first_stderr(one_rank: None, monkeypatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(private_names, "check", lambda: sys.stderr.write(""))
    start.start()


def test_a_start_does_without_deepspeeds_muon_and_a_stop_gives_it_back(one_rank: None) -> None:
    start.start()
    stand_in = sys.modules[start._MUON]
    assert stand_in is resolve_name(start._MUON)
    assert not isinstance(torch.optim.AdamW([torch.zeros(1)]), stand_in.MuonWithAuxAdam)
    start.stop()
    assert start._MUON not in sys.modules
