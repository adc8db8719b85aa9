"""Modules for hidden patches, which are a learnt mask token and a decoder."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fd_large.backbones.initialization import NORMAL, fill
from fd_large.tasks.distillation.section import Mask

Grid = tuple[int, int]


class MaskToken(nn.Module):
    """Replaces hidden patches by a learnt token.

    The token is in a separate Module, so that the hooks of ZeRO-3 all-gather it when it is used.

    Args:
        width: Channels of the tokens, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Three dimensions, as in the published code, so that weight decay applies to the token.
        self.token = nn.Parameter(torch.empty(1, 1, width))
        fill(self.token, NORMAL)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the patches (B, H, W, C), in which hidden patches are replaced by the token.

        Args:
            tokens: (B, H, W, C), patches.
            mask: (B, h, w) bool, True if hidden. If h and w are smaller than H and W, each element
                is for a rectangle of patches.
        """
        for axis in (1, 2):
            size = tokens.shape[axis]
            mask = mask.repeat_interleave(-(-size // mask.shape[axis]), axis)
            mask = mask.narrow(axis, 0, size)
        return torch.where(mask[..., None], self.token.to(tokens.dtype), tokens)


class Decoder(nn.Module):
    """Transformer that predicts the tokens of all patches from the tokens of visible patches.

    Source: He et al. (MAE), arXiv 2111.06377; Liu et al. (dBOT), arXiv 2209.03917.

    Args:
        width: Number of channels of the student's tokens, C.
        mask: The recipe's section `mask`, with the decoder's width, blocks and attention heads.
    """

    def __init__(self, width: int, mask: Mask) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block  # Its import costs about a second.

        decoder_width, norm = mask.decoder_width, partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, decoder_width)
        self.mask_token = MaskToken(decoder_width)
        self.blocks = nn.ModuleList(
            Block(decoder_width, mask.decoder_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(mask.decoder_depth)
        )
        self.norm = norm(decoder_width)

    def forward(self, tokens: Tensor, places: Tensor, grid: Grid) -> Tensor:
        """Returns P prefix tokens and all N patches, (B, P + N, decoder_width).

        Args:
            tokens: (B, P + V, C), prefix tokens and visible patches.
            places: (B, V) int64, row-major indices of the visible patches.
            grid: Rows and columns of all patches.
        """
        x = self.embed(tokens)
        prefix = x.shape[1] - places.shape[1]
        visible = x.new_zeros(len(x), grid[0] * grid[1], x.shape[-1])
        index = places[..., None].expand(-1, -1, x.shape[-1])
        visible = visible.scatter(1, index, x[:, prefix:]).unflatten(1, grid)
        is_hidden = torch.ones(visible.shape[:3], dtype=torch.bool, device=x.device)
        is_hidden = is_hidden.flatten(1).scatter(1, places, False).unflatten(1, grid)
        patches = self.mask_token(visible, is_hidden).flatten(1, 2)
        patches = patches + sin_cos_positions(grid, x.shape[-1], x.device).to(patches)
        x = torch.cat([x[:, :prefix], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sin_cos_positions(grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
    """Returns MAE's fixed position embeddings of all patches, (N, width) float32.

    The first half of the channels depends on the column of a patch, the second half on its row.

    Args:
        grid: Rows and columns of the N patches.
        width: Number of channels, a multiple of 4.
        device: Device of the result; None for torch's default device.
    """
    # Computed on the device, since a copy from the CPU would make the host wait in each step.
    number = partial(torch.arange, dtype=torch.float64, device=device)
    rate = 10000.0 ** -(number(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(*(number(size) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in (columns, rows)]
    return torch.cat([part for axis in angles for part in (axis.sin(), axis.cos())], dim=1).float()
