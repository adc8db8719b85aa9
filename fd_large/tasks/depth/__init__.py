"""Depth of every pixel from a student's features: heads, a scale-invariant loss, and tests."""
