"""Heads on the pyramid that predict proposals, boxes and masks, and their matching to objects."""
