"""The learnt token stands where a cell is hidden; the decoder gives a map of all places."""

from __future__ import annotations

import torch

from fd_large.tasks.distillation.masked.decoder import Decoder, MaskToken, sin_cos_positions
from fd_large.tasks.distillation.section import Mask


def test_a_hidden_cell_may_have_several_patches_or_end_outside():
    token = MaskToken(3)
    mask = torch.tensor([[[True, False], [False, False]]])
    out = token(torch.zeros(1, 5, 6, 3), mask)
    replaced = (out != 0).all(-1)[0]
    assert torch.equal(out[0, 0, 0], token.token[0, 0])
    assert replaced[:3, :3].all()
    assert replaced.sum() == 9


def test_the_decoder_puts_each_token_at_its_place():
    """Without blocks, a token meets its own position alone."""
    torch.manual_seed(0)
    decoder = Decoder(6, Mask(decoder_width=8, decoder_depth=1, decoder_heads=2))
    decoder.blocks = torch.nn.ModuleList()
    tokens, places = torch.randn(2, 1 + 2, 6), torch.tensor([[1, 3], [5, 0]])
    out = decoder(tokens, places, (2, 3))
    positions = sin_cos_positions((2, 3), 8)
    assert out.shape == (2, 1 + 6, 8)
    seen = decoder.norm(decoder.embed(tokens[:, 1:]) + positions[places])
    assert torch.allclose(out[:, 1:].gather(1, places[..., None].expand(-1, -1, 8)), seen)
    unseen = decoder.norm(decoder.mask_token.token[0, 0] + positions[2])
    assert torch.allclose(out[:, 1 + 2], unseen.expand(2, -1))
    assert torch.allclose(out[:, :1], decoder.norm(decoder.embed(tokens[:, :1])))


def test_positions_are_of_the_columns_and_then_of_the_rows():
    positions = sin_cos_positions((3, 4), 8).view(3, 4, 8)
    assert torch.equal(positions[0, :, :4], positions[2, :, :4])
    assert torch.equal(positions[:, 0, 4:], positions[:, 3, 4:])
    assert len(positions.flatten(0, 1).unique(dim=0)) == 12
