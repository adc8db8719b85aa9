"""Masked distillation: a student that is not shown some patches of an image."""
