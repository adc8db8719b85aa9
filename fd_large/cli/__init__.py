"""The command line: one file a command, and one parser (`arguments.py`) for all of them.

A command's file holds the dataclass of its arguments, a function with plain arguments that does
or calls the work, and its printed output. Reusable work belongs in a lower room. No file here
imports torch at its top, so that help and mistakes appear in less than half a second.
"""
