"""Evaluation of frozen features on labelled images: extraction, k-NN and the linear probe.

A model is any function from images to a feature map; no code here knows tasks, runs or weights.
"""
