"""Heads of tokens begin as on a CPU, wherever they are made."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import CARD

from fd_large.backbones.initialization import HostDraws
from fd_large.tasks.distillation.heads.registry import HEADS, reads_maps


@pytest.mark.parametrize("name", [n for n, make in HEADS.items() if not reads_maps(make)])
def test_no_parameter_of_a_head_is_drawn_by_the_generator_of_a_device(card, name):
    torch.manual_seed(0)
    plain = HEADS[name](32, 12).state_dict()
    assert card.draws == []
    torch.manual_seed(0)
    with torch.device(CARD), HostDraws():
        made = HEADS[name](32, 12).state_dict()
    assert card.draws == []
    assert {value.device for value in made.values()} == {CARD}
    assert all(torch.equal(made[key].cpu(), value) for key, value in plain.items())
    with torch.device(CARD):
        HEADS[name](32, 12)
    assert card.draws, "what is drawn on the card is seen"
