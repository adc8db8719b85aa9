"""Runs a plain ViT on large images, where most blocks attend within windows.

Windows are as large as the grid on which the model was distilled, so that its position table fits
inside a window. The last block of each quarter of the model attends to the whole image, as in
ViTDet (blocks 2, 5, 8, 11 of 12). The class token, which belongs to no window, and the final norm
are left out. The parameters keep the distilled model's names; only the calls of its blocks differ.

Source: Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.backbones.drop_path import branch_scales
from fd_large.backbones.layers import residual_dtype
from fd_large.backbones.position_tables import fit_offsets, fit_positions
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError

NUM_GLOBAL_BLOCKS = 4


def global_blocks(depth: int) -> frozenset[int]:
    """Returns the numbers of the blocks that attend to the whole image, counted from 0.

    These blocks are the last blocks of the four quarters of the model.

    Args:
        depth: Number of the ViT's blocks.
    """
    quarters = min(NUM_GLOBAL_BLOCKS, depth)
    return frozenset((i + 1) * depth // quarters - 1 for i in range(quarters))


def check(vit: ViT) -> None:
    """Raises ConfigError if a ViT's positions cannot be used within windows.

    The grid of positions must be square, and a table of relative positions must be shared by all
    blocks.
    """
    rows, columns = vit.image_grid
    if rows != columns:
        raise ConfigError(
            f"architecture.image_size: windows are square; got positions for {rows}x{columns} "
            "patches, expected as many rows as columns. Use a model of square images."
        )
    if vit.has_relative_position and vit.rel_pos_bias is None:
        raise ConfigError(
            "architecture.relative_position: a windowed ViT needs one table of relative positions "
            "for all blocks, or none; got 'block', expected 'shared' or 'none'. Keep the value "
            "with which the model was distilled."
        )


def windowed_map(vit: ViT, pixels: Tensor, keep: Tensor | None) -> Tensor:
    """Runs a ViT on images of any size, and returns the map after the last block.

    Args:
        vit: The ViT.
        pixels: (B, 3, H, W), normalised, of any floating-point dtype; padded at right and bottom to
            whole patches.
        keep: (num_sites, B) bool, the branches that drop path keeps; None to keep all branches.

    Returns: (B, ceil(H / p), ceil(W / p), C) in the data type of the residual stream, where p is
        the patch size.
    """
    p = vit.patch_size
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, -width % p, 0, -height % p))
    scales = branch_scales(keep, vit.drop_path_rates, len(pixels), pixels.device)
    dtype = residual_dtype(vit.residual, vit.patch_embed.proj.weight.dtype)
    x = vit.patch_embed(pixels, dtype)  # (B, H/p, W/p, C)
    grid = (x.shape[1], x.shape[2])
    if vit.pos_embed is not None:
        x = x + fit_positions(vit.pos_embed, vit.image_grid, grid).to(dtype)
    if vit.norm_pre is not None:
        x = vit.norm_pre(x)
    window = vit.image_grid[0]
    inside = whole = None
    if vit.rel_pos_bias is not None:
        inside = vit.rel_pos_bias()[: (2 * window - 1) ** 2]
        whole = fit_offsets(inside, vit.image_grid, grid)
    everywhere = global_blocks(vit.depths[0])
    x = rearrange(x, "b h w c -> b (h w) c")
    for i, block in enumerate(vit.blocks):
        sites = None if scales is None else scales[2 * i : 2 * i + 2]
        if i in everywhere:
            x = block(x, sites, whole, grid)
        else:
            x = block(x, sites, inside, grid, window)
    return x.unflatten(1, grid)
