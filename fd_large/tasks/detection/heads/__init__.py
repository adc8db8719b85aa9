"""Heads on top of the pyramid for proposals, boxes and masks, and the matching to objects."""
