"""Heads that predict the depth of each pixel from a map: MIM-Depth's decoder, and a linear head."""
