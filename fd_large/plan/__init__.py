"""Memory and duration of a run on a cluster, computed from counts.

It is arithmetic on rates and on counts, which `engine/counting/count.py` makes, without torch. This
package builds no model and sees no whole recipe.
"""
