"""Computes the memory and duration of a run on a cluster, without running it.

The inputs are rates of the hardware and counts of a step's operations, which
`engine/counting/count.py` makes. This package uses no torch, builds no model and takes no whole
recipe.
"""
