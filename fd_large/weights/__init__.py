"""Tensors in and out of files, by published names."""
