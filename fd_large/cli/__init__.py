"""The command line, with a file for each command and one parser (`arguments.py`) for all.

The file of a command holds the dataclass of its arguments, a function with plain arguments that
does the work or calls it, and `main`, which parses the arguments after the command's name, prints
the results and returns the exit code. Work that others may use belongs in a lower package. No file
in this folder imports torch at its top, so that help and error messages appear in less than half a
second.
"""
