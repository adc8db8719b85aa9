"""The tasks, each in a folder, and the folder `dense/`, which the dense tasks share.

The folder of a task has `section.py` (its recipe section, without torch), `job.py` (the interface
that the engine calls), `task.py` (the Module with the loss), and code of this task alone. To add a
task, add a folder and list it in `registry.py`. A task may import `dense/` and every package that
is below the tasks in `docs/architecture.md`, but no other task.
"""
