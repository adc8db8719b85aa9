"""The code that knows DeepSpeed: its JSON, its start, engines, shards, state and optimiser.

Outside of this folder and `checkpoint/` nothing imports deepspeed or reads its private attributes.
No file here knows a task.
"""
