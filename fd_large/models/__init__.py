"""Backbones as pure mathematics: plain arguments in, a feature map out."""
