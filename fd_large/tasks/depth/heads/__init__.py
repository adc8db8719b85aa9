"""Heads that predict depth from a map: MIM-Depth's decoder, a linear layer."""
