"""The file of a user's own small model, `Net`."""

NET = """
from torch import nn

from fd_large.backbones.feature_map import FeatureMap


class Net(nn.Module):
    width, stride, num_prefix_tokens, drop_path_rates = 8, 8, 0, ()

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, self.width, self.stride, self.stride)

    def blocks(self):
        return []

    def grid(self, height, width):
        return height // self.stride, width // self.stride

    def forward(self, images, keep=None):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return FeatureMap(tokens, self.grid(*images.shape[-2:]), 0)
"""
