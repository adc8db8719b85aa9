from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_models import mlp, norm, padded, vit_of
from torch import Tensor, nn

from fd_large.backbones.position_tables import fit_offsets
from fd_large.errors import ConfigError
from fd_large.tasks.dense.windowed_vit import global_blocks, windowed_map


def by_hand_vit(net: nn.Module, image: Tensor) -> Tensor:
    """The last map of one image; windows at the edge are cut smaller instead of padded."""
    x = net.patch_embed.proj(padded(image.permute(1, 2, 0), 16).permute(2, 0, 1)[None])[0]
    x = x.permute(1, 2, 0)
    rows, columns = x.shape[:2]
    side = net.image_grid[0]
    learned = net.rel_pos_bias.relative_position_bias_table[: (2 * side - 1) ** 2]
    for number, block in enumerate(net.blocks):
        whole = number in global_blocks(len(net.blocks))
        table = fit_offsets(learned, (side, side), (rows, columns)) if whole else learned
        reach = (rows, columns) if whole else (side, side)
        normed, out = norm(block.norm1, x), torch.zeros_like(x)
        for top in range(0, rows, reach[0]):
            for left in range(0, columns, reach[1]):
                here = (slice(top, top + reach[0]), slice(left, left + reach[1]))
                some = normed[here]
                spots = torch.stack(
                    torch.meshgrid(*(torch.arange(n) for n in some.shape[:2]), indexing="ij"), -1
                ).reshape(-1, 2)
                offset = spots[:, None] - spots[None]
                index = (offset[..., 0] + reach[0] - 1) * (2 * reach[1] - 1)
                bias = table[index + offset[..., 1] + reach[1] - 1]  # (N, N, h)
                attn = block.attn
                bias_of_qkv = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
                q, k, v = (
                    t.unflatten(-1, (2, -1)).transpose(0, 1)
                    for t in F.linear(some.flatten(0, 1), attn.qkv.weight, bias_of_qkv).chunk(3, -1)
                )
                logits = q @ k.mT * q.shape[-1] ** -0.5 + bias.permute(2, 0, 1)
                mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
                out[here] = attn.proj(mixed).unflatten(0, some.shape[:2])
        x = x + block.gamma_1 * out
        x = x + block.gamma_2 * mlp(block.mlp, norm(block.norm2, x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (100, 173), (40, 200)])
def test_windows_of_a_vit_equal_windows_cut_by_hand(size):
    net = vit_of()
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(2))
    got = windowed_map(net, image[None], None)
    assert got.shape[1:3] == (-(-size[0] // 16), -(-size[1] // 16))
    torch.testing.assert_close(got[0], by_hand_vit(net, image), atol=1e-5, rtol=1e-5)


def test_the_last_block_of_each_quarter_sees_all():
    assert global_blocks(12) == {2, 5, 8, 11}
    assert global_blocks(24) == {5, 11, 17, 23}
    assert global_blocks(3) == {0, 1, 2}


def test_absolute_positions_take_the_images_grid():
    net = vit_of(model="clip_vit_base_patch16")
    assert windowed_map(net, torch.zeros(1, 3, 50, 90), None).shape == (1, 4, 6, 8)


def test_positions_that_cannot_be_carried_over_are_refused():
    expected = r"relative_position: a windowed ViT needs one table .* for all blocks, or none; got"
    with pytest.raises(ConfigError, match=expected):
        vit_of(relative_position="block")
