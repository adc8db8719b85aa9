"""Is a model better? Protocols that measure models, in one table (`registry.py`) with a door.

The functions of frozen features that they call are `probes/`, the trainings are those of `tasks/`;
`cli/` reads the command line and prints.
"""
