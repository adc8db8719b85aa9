"""Feature distillation: a student learns a frozen teacher's whitened feature map.

Here live the loss on aligned maps, the teacher and where its weights are held, the canary that
watches it, and held-out losses. Nothing outside of this folder knows a teacher's map.
"""
