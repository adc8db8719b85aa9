"""Protocols that compare models, in one table (`registry.py`) that users can extend.

Functions of frozen features are in `probes/`, trainings in `tasks/`; `cli/` parses the command
line and prints.
"""
