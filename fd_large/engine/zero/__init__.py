"""Adapts DeepSpeed to fd_large's engine: JSON, start-up, engines, shards, state and optimiser.

Outside of this folder only distillation's `teacher.py` uses the deepspeed module, and only
`engine/loop.py` reads a private attribute of an engine, the norm of the gradients. No file here
depends on a certain task.
"""
