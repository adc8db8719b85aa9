"""Heads on top of the pyramid: proposals, boxes, masks, and how they are matched."""
