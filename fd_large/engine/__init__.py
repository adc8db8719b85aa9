"""Builds, trains, evaluates, stores, resumes and replays any task at any ZeRO stage.

The package holds the interfaces `Task` (what is trained) and `TrainingJob` (what a task brings to
its training), the run and its loop, the frozen models, and `zero/`, which adapts DeepSpeed. No file
here imports a task or compares the name of a task or of a backbone family. Only `run.py`,
`opening.py` and `job.py` take a whole `Run`; the others take plain arguments.
"""
