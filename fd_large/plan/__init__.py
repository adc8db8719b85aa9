"""Computes memory and duration of a run on a cluster from counts.

The package is arithmetic on rates and on counts, which `engine/counting/count.py` makes, without
torch. It builds no model and sees no whole recipe.
"""
