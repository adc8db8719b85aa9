"""Feature distillation: a student learns a frozen teacher's whitened feature map.

The folder has the loss on aligned maps, the teacher and the placement of its weights, the canary
that checks the teacher's weights during a run, and held-out losses. The engine and other tasks use
no teacher.
"""
