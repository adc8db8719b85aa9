"""Whether a run fits a cluster, and how long it takes: counts in, memory and seconds out.

Arithmetic on counts (`engine/counting/count.py` makes them) and rates, without torch. Nothing here
builds a model or sees a whole recipe.
"""
