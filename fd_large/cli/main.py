"""The command line: `python -m fd_large COMMAND` and `fd_large/train.py`.

A command is the file of its name in this folder. It imports torch only once it needs it, so that
the help, the tables and the user's mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module

from fd_large.cli.arguments import HELP, HelpShown, choose
from fd_large.errors import FDError
from fd_large.launch import find_rank
from fd_large.runtime import terminal

COMMANDS = {
    "train": "Train a recipe; `deepspeed fd_large/train.py` does it on many processes.",
    "recipes": "List the runs of record: what they need, how long they take, what to expect.",
    "plan": "Say whether a recipe fits a cluster, how fast it is and how long it takes.",
    "report": "Draw a run's curves and say what came out, from the files in its folder.",
    "checkpoint": "List, verify, prune, export or import the checkpoints of a run.",
    "weights": "Say what a weights file holds, or convert it to another format.",
    "export": "Write a run's student where timm or Hugging Face load it, with a model card.",
    "doctor": "Say what a run finds on this machine, or on all nodes, and what to fix.",
    "replay": "Run a step that the guard refused again, on one device.",
    "predict": "Draw what a run's detector sees in images, and write it as JSON.",
    "evaluate": "Measure models on labelled images: k-NN, linear probe, fine-tuning, detection.",
    "diagnose": "Show what models attend to, how flat their loss is, how alike their layers are.",
}

# A launcher ends all ranks when the first one exits: the silent ones let rank 0 speak before.
SECONDS_FOR_RANK_0 = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    The user's mistakes are a line each on stderr, and the code that the error says, mostly 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = find_rank()
    if rank and not HELP.isdisjoint(arguments):
        return 0  # Rank 0 prints the help.
    try:
        command, rest = choose(arguments, COMMANDS)
        return import_module(f"fd_large.cli.{command}").main(rest)
    except HelpShown:
        return 0
    except FDError as error:
        # Every rank makes the same mistake and one reports it, unless only one has met it.
        if rank == 0 or error.rank_local:
            terminal.show_error(str(error))
        else:
            time.sleep(SECONDS_FOR_RANK_0)
        return error.exit_code
    except BrokenPipeError:  # `... --help | head` closes the pipe early: no mistake of anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
