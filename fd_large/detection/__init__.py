"""Boxes and masks from a distilled student: heads, losses, data, official evaluation."""
