"""Masked distillation, in which some patches of an image are hidden from the student."""
