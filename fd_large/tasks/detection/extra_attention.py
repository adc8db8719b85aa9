"""A global self-attention layer on the backbone's last map, before the pyramid, as in HTC++.

Swin's paper only names "an extra global self-attention layer on the last stage's output". The layer
follows an open reimplementation (czczup/ViT-Adapter, configs/htc++), with norms before attention
and MLP, 32 heads, an MLP four times as wide, and a norm at the end. The drop path of 0.3 in the
reimplementation is left out.

Sources: Liu et al., arXiv 2103.14030, appendix A2.2; Chen et al., arXiv 2205.08534.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.initialization import Draw
from fd_large.backbones.layers import LayerNorm, Linear

NUM_HEADS, MLP_RATIO, EPS = 32, 4, 1e-6


class ExtraAttention(nn.Module):
    """A pre-norm transformer block with attention among all positions of a map, and a final norm.

    Args:
        width: Channels of the map, C.
    """

    def __init__(self, width: int):
        super().__init__()
        draw = Draw("normal", std=0.02)
        self.num_heads = math.gcd(NUM_HEADS, width)
        self.norm1, self.norm2, self.norm = (LayerNorm(width, EPS) for _ in range(3))
        self.qkv = Linear(width, 3 * width, draw=draw)
        self.proj = Linear(width, width, draw=draw)
        self.fc1 = Linear(width, MLP_RATIO * width, draw=draw)
        self.fc2 = Linear(MLP_RATIO * width, width, draw=draw)

    def forward(self, x: Tensor, sizes: Tensor, stride: float) -> Tensor:
        """Returns the backbone's last map after attention, in the same shape and dtype.

        Args:
            x: (B, H, W, C), the map.
            sizes: (B, 2), height and width in pixels of each image without its padding. Padding is
                masked, so that an image's result does not depend on the rest of its batch.
            stride: Stride of the map, in pixels.
        """
        images, rows, columns, width = x.shape
        mask = self._inside(rows, columns, sizes, stride)  # (B, 1, 1, N)
        tokens = x.flatten(1, 2)
        qkv = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D) each
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return self.norm(tokens).view(images, rows, columns, width).to(x.dtype)

    @staticmethod
    def _inside(rows: int, columns: int, sizes: Tensor, stride: float) -> Tensor:
        height, width = sizes.T[:, :, None]
        down = torch.arange(rows, device=sizes.device) * stride < height  # (B, H)
        across = torch.arange(columns, device=sizes.device) * stride < width
        # An image without a pixel keeps its first place, since a softmax over nothing gives NaN.
        down[:, 0] = across[:, 0] = True
        return (down[:, :, None] & across[:, None, :]).flatten(1)[:, None, None]
