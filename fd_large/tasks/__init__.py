"""The tasks, each in a folder with the same files, and `dense/`, which dense tasks share.

A folder has `section.py` (its recipe section, without torch), `job.py` (the engine's interface),
`task.py` (the Module with the loss), and code of this task alone. To add a task, add a folder and
its name in `registry.py`. A task may import `dense/` and every package that `docs/architecture.md`
places below the tasks, but no other task.
"""
