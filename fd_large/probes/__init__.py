"""Frozen features on labelled images: their extraction, k-NN and the linear probe.

A model is any function from images to a feature map; nothing here knows tasks, runs or weights.
"""
