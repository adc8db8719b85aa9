"""Whether a run fits a cluster, and how long it takes: counts in, memory and seconds out.

Arithmetic on architectures and rates, without torch (`probe.py` alone imports it, to measure
rates). Nothing here builds a model or sees a whole recipe.
"""
