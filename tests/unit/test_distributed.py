"""The collectives where there is one rank; `test_launchers.py` runs them on several."""

from __future__ import annotations

import pytest
import torch

from fd_large import distributed
from fd_large.errors import ConfigError
from fd_large.launch import find_launch


def test_without_a_group_there_is_one_rank() -> None:
    assert distributed.rank() == distributed.local_rank() == 0
    assert distributed.world_size() == 1
    assert distributed.is_main()
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.sum_tensor(torch.arange(2)).tolist() == [0, 1]
    assert distributed.local_world_size() == 1
    assert distributed.max_rank(3) == 3
    assert distributed.broadcast_object("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize("node_size", [0, 2])
def test_node_group_refuses_nodes_that_do_not_fill_the_ranks(node_size: int) -> None:
    with pytest.raises(ConfigError, match=f"got {node_size}, expected a divisor of the 1 ranks"):
        distributed.node_group(node_size)


def test_ranks_that_are_set_by_hand_meet_on_any_nodes() -> None:
    """They have no launcher in common, and may all count as those of one node."""
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert distributed._name_of(find_launch(by_hand | meeting)) == "fd_large//0"
