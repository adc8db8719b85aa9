"""The collectives where there is one rank; `test_launchers.py` runs them on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import sockets
import torch
import torch.distributed as dist

from fd_large.errors import ConfigError, LaunchError
from fd_large.ranks import distributed
from fd_large.ranks.launch import find_launch


def test_without_a_group_there_is_one_rank() -> None:
    assert distributed.rank() == distributed.local_rank() == 0
    assert distributed.world_size() == 1
    assert distributed.is_main()
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.sum_tensor(torch.arange(2)).tolist() == [0, 1]
    assert distributed.local_world_size() == 1
    assert distributed.max_rank(3) == 3
    assert distributed.broadcast_object("x") == distributed.of_main(lambda: "x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()
    distributed.stop()


def test_gpus_are_asked_for_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match=r"^DS_ACCELERATOR: .*got 'cuda'"):
        distributed.start()
    assert not dist.is_initialized()


@pytest.mark.parametrize("node_size", [0, 2])
def test_node_group_refuses_nodes_that_do_not_fill_the_ranks(node_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"got {node_size}, .* 1 ranks"):
        distributed.node_group(node_size)


def test_ranks_that_are_set_by_hand_meet_on_any_nodes() -> None:
    """They have no launcher in common, and may all count as those of one node."""
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert distributed._name_of(find_launch(by_hand | meeting)) == "fd_large//0"


def test_a_token_makes_the_name_one_that_nobody_guesses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    monkeypatch.setenv("FD_LARGE_TOKEN_FILE", str(token))
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    name = distributed._name_of(find_launch(by_hand | meeting))
    assert name == "fd_large//0/0123456789abcdef"


def test_the_group_of_one_rank_copies_and_has_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        # Given back after the test, in which `start` writes them.
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(distributed, "watch_launcher", lambda *_: None)
    before = sockets.listening()
    distributed.stop()
    distributed.start(find_launch({}))
    try:
        numbers, gathered = torch.arange(4.0), torch.zeros(4)
        dist.all_gather_single(gathered, numbers)
        assert gathered.tolist() == distributed.sum_tensor(numbers).tolist() == [0, 1, 2, 3]
        outputs = [torch.zeros(4)]
        dist.all_to_all(outputs, [numbers])
        assert outputs[0].tolist() == [0, 1, 2, 3]
        group = distributed.node_group(1)
        assert distributed.sum_tensor(numbers, group).tolist() == [0, 1, 2, 3]
        assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
        assert distributed.broadcast_object("b") == "b"
        assert distributed.max_rank(3) == 3
        distributed.barrier()
        assert sockets.listening() == before
    finally:
        distributed.stop()
