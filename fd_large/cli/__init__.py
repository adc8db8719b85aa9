"""The command line: one file a command, and one parser (`arguments.py`) for all of them.

A command's file holds the dataclass of its arguments, a function with plain arguments that does or
calls the work, and what is printed. Work that others could use belongs in a lower room. Nothing
here imports torch at the top of a file: help and mistakes answer in less than half a second.
"""
