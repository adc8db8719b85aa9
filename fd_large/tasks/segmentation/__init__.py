"""Segmentation: the class of every pixel, from a student's features."""
