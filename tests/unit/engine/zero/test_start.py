"""What DeepSpeed keeps between two engines."""

from __future__ import annotations

import deepspeed
import pytest

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
