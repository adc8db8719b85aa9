"""Heads that make depth of a map: MIM-Depth's decoder, a linear layer."""
