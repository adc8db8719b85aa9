"""A block that uses the process as a rank, and leaves it as it was."""

from __future__ import annotations

import logging
import os
import signal
import warnings

import pytest
import torch
from process_state import state
from torch import distributed as dist

from fd_large.engine.guest import guest
from fd_large.errors import LaunchError


def change_everything():
    assert dist.is_initialized()
    os.environ["FD_TEST"] = "set"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger().addHandler(logging.StreamHandler())
    logging.getLogger().setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    warnings.showwarning = print
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    torch.rand(3)


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_as_it_was(fails):
    before = state()
    with pytest.raises(KeyError) if fails else guest():
        if fails:
            with guest():
                change_everything()
                raise KeyError
        change_everything()
    assert state() == before


def test_one_of_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="got WORLD_SIZE 2"), guest():
        pass


def test_a_process_with_a_group_of_its_own_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match="process group"), guest():
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
