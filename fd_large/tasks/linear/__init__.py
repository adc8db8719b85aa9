"""The linear probe as Feature-Distillation makes it: a frozen model, a norm and one linear layer.

The quick probe of cached features is in `probes/`.
"""
