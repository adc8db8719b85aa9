"""Distillation as a task: frozen teacher, projection, aligned maps, whitening and the loss."""
