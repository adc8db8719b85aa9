"""Tests of segmentation: sliding windows, several scales, areas, scores, pictures."""
