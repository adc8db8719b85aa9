"""Feature distillation: a student learns a frozen teacher's whitened feature map.

The folder has the loss on aligned maps, the teacher and the placement of its weights, the canary
that watches the teacher, and held-out losses. The engine and other tasks use no teacher's map.
"""
