"""Entry point of the command line, for `python -m fd_large COMMAND` and `fd_large/train.py`.

Each command is the file of its name in this folder. A command imports torch only when it needs
torch, so that help, tables and error messages appear at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext, suppress
from importlib import import_module

import fd_large
from fd_large import doors, files, imports
from fd_large.cli.arguments import HELP, HelpShown, choose
from fd_large.errors import ConfigError, Exit, FDError
from fd_large.ranks import failures
from fd_large.ranks.forked import check_alone, run_ranks
from fd_large.ranks.launch import find_rank
from fd_large.ranks.starting import leave_at_signals
from fd_large.runtime import terminal
from fd_large.runtime.display import shown

COMMANDS = {
    "train": "Train a recipe.",
    "init": "Write the Slurm scripts to a folder of yours.",
    "recipes": "List the recipes: what each needs, takes and should give; or show one.",
    "models": "List the models that a student or a teacher may be.",
    "statistics": "Measure statistics of a teacher's channels, for standardised or rotated "
    "targets.",
    "cache": "Store a teacher's maps of fixed views, from which runs learn without the teacher.",
    "plan": "Say whether a recipe fits a cluster, and how long it takes there.",
    "runs": "List the runs below a folder: the state of each, and the best by a metric.",
    "report": "Draw a run's curves and summarise its results.",
    "checkpoint": "List, verify, prune, export or import a run's checkpoints.",
    "weights": "Inspect a file of weights, convert it to another format, or download it.",
    "export": "Write a run's student for timm or Hugging Face.",
    "doctor": "Check this machine for training, and say what to fix.",
    "replay": "Repeat a step that the guard refused.",
    "predict": "Draw what a run's model sees in images: objects, classes or depth.",
    "embed": "Write the features of a folder's images to a table.",
    "evaluate": "Measure models on labelled images.",
    "transfer": "Fine-tune runs on labels, segmentation, detection and depth, for one table.",
    "diagnose": "Show attention, loss landscapes and layer similarity of models.",
}

_BEGIN = (
    "--ranks 2 before a command runs it in two processes on this machine, one per GPU.\nTo begin: "
    "train --deepspeed_config zero3 takes four minutes, also on CPUs (docs/quickstart.md)."
)

RANKS = "--ranks"
# After a process has initialised a GPU, ranks that are forked from it cannot use the GPU, and
# libraries may initialise it when they are imported.
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

# A launcher ends all ranks when the first one exits, so the others wait until rank 0 has printed.
SECONDS_FOR_RANK_0 = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    A mistake of the user's is printed on stderr, and the exit code is then that of the `FDError`,
    mostly 2.

    Args:
        arguments: The command and its arguments; None for those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = find_rank()
    if rank and not HELP.isdisjoint(arguments):
        return 0  # Rank 0 prints the help.
    if arguments == ["--version"]:
        print(f"fd_large {fd_large.__version__}")
        return 0
    doors.allow_named(arguments, remember=rank == 0)
    # A run records sys.argv as its command.
    arguments, sys.argv[1:] = map(doors.plain_names, (arguments, sys.argv[1:]))
    terminal.mask_uncaught()
    with suppress(AttributeError):  # A name that is not UTF-8 is no reason to fail; see stderr.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if arguments and arguments[0].partition("=")[0] == RANKS:
            return _run_on_ranks(arguments)
        command, rest = choose(arguments, COMMANDS, note=_BEGIN)
        with shown(command) if rank == 0 else nullcontext():
            return import_module(f"fd_large.cli.{command}").main(rest)
    except HelpShown:
        return 0
    except FDError as error:
        return _refused(error, rank)
    except KeyboardInterrupt:
        failures.tell(Exit.INTERRUPTED, "interrupted")
        if rank == 0:
            terminal.show_error("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:  # `... --help | head` closes the pipe early: no mistake of anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A refused path that no check found is the user's mistake. Other errors are faults of this
        # package or of a library, as is a connection error without a path, which a server caused.
        of_server = isinstance(error, ConnectionError) and error.filename is None
        if of_server or error.errno not in files.REFUSED.keys() | files.PASSING:
            failures.tell(Exit.LOST, f"{type(error).__name__}: {error}")
            raise
        logging.getLogger(__name__).debug("the file system raised an error", exc_info=True)
        refusal = files.unusable("", error)
        refusal.rank_local = True
        return _refused(refusal, rank)
    except Exception as error:
        failures.tell(Exit.LOST, f"{type(error).__name__}: {error}")
        raise


def _run_on_ranks(arguments: list[str]) -> int:
    """Runs a command in several forked processes, one for each rank; returns the exit code.

    The first of the `arguments` are `--ranks N` or `--ranks=N`; the command and its own follow.

    Raises:
        ConfigError: If N is not a positive number.
        LaunchError: If a launcher has already started this process as one of several ranks.
    """
    _, equals, text = arguments[0].partition("=")
    text, *rest = arguments[1:] or [""] if not equals else [text, *arguments[1:]]
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{RANKS}: not a number of processes; got {text!r}, expected 1 or more. Write "
            f"{RANKS} 2 before the command."
        )
    if not HELP.isdisjoint(rest):
        return main(rest)
    check_alone()
    command, command_arguments = choose(rest, COMMANDS, note=_BEGIN)
    trains = command == "train"
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not any(map(files.kind_of, _GPUS)):
        # The user's own code is to see its rank while it is imported, which every rank does.
        if trains and not any(doors.PREFIX in argument for argument in command_arguments):
            import_module("fd_large.cli.train").checked(command_arguments)
        with imports.for_good("deepspeed"):
            import_module("fd_large.engine.run")
            import_module("fd_large.tasks.jobs")
    sys.argv[1:] = rest  # A run records its own command, without its launcher's.
    prepare = leave_at_signals if trains else lambda: None
    return run_ranks(int(text), lambda: main(rest), prepare=prepare)


def _refused(error: FDError, rank: int) -> int:
    """Prints an error of the user's on one rank, and returns the error's exit code.

    An error that is `rank_local` is printed by this rank; any other error is printed by rank 0, for
    which the other ranks wait. An error that was already printed is not printed again.
    """
    failures.tell(error.exit_code, str(error))
    # Every rank makes the same mistake and one reports it, unless only one has met it.
    if rank == 0 or error.rank_local:
        if not error.shown:
            terminal.show_error(str(error))
    else:
        time.sleep(SECONDS_FOR_RANK_0)
    return error.exit_code
