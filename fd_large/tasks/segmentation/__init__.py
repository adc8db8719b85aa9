"""Segmentation: a student's features learn to name the class of every pixel."""
