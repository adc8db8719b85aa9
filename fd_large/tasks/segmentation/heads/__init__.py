"""Heads that make classes of maps: UPerNet, a convolutional head, a linear one."""
