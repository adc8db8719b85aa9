"""Distillation: a frozen teacher, a projection, aligned maps, whitening and the loss as one task."""
