"""Memory and duration of a run on a cluster, computed from counts.

Arithmetic on counts (`engine/counting/count.py` makes them) and rates, without torch. This room
builds no model and sees no whole recipe.
"""
