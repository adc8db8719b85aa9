"""Semantic segmentation, which predicts the class of every pixel from a student's features."""
