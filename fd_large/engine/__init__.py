"""Trains any task at any ZeRO stage: build, loop, checkpoints, evaluations, resume, replay.

Here live the contracts `Task` (what is trained) and `TrainingJob` (what a task brings to it), the
run and its loop, models that are frozen, and `zero/`, the only place that knows DeepSpeed. A file
here imports no task, compares no task's or backbone family's name, and, but for `run.py`, takes
plain arguments rather than a whole `Run`.
"""
