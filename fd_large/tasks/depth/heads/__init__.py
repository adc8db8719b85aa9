"""Heads that predict depth from a map: MIM-Depth's decoder, and a linear layer."""
