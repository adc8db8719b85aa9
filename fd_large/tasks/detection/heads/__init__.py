"""Heads on top of the pyramid: proposals, boxes, masks, and their matching."""
