"""The tasks: one folder each, siblings with the same files, and `dense/` for what some share.

A folder has `section.py` (its recipe section, without torch), `job.py` (what the engine asks),
`task.py` (the Module with the loss), and what only this task needs. Adding a task is a folder and
its name in `registry.py`. A task may import every lower room and `dense/`, but no other task.
"""
