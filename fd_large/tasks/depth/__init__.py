"""Depth estimation, which predicts the depth of every pixel from a student's features."""
