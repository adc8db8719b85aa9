"""Masked distillation: some patches of an image are hidden from the student."""
