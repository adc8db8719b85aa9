"""Heads that predict classes from maps: UPerNet, a convolutional head, a linear head."""
