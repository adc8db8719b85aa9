"""Words to calls: `python -m fd_large COMMAND` and `fd_large/train.py`.

torch is imported only once a command needs it, so that help, tables and the user's mistakes
answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from fd_large.cli.flags import parse_train, print_train_help
from fd_large.errors import ConfigError, FDError, LostRankError, nearest
from fd_large.recipes import registry
from fd_large.recipes.run import Run
from fd_large.runtime import terminal

# Whoever started the ranks sets one of these; torch must not be needed to find rank 0.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

# A launcher ends all ranks when the first one exits: the silent ones let rank 0 speak before.
SECONDS_FOR_RANK_0 = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code; 2 and one sentence for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except FDError as error:
        # Every rank makes the same mistake and one of them tells it, but for what only one met.
        if find_rank(os.environ) == 0 or error.rank_local:
            terminal.tell_error(str(error))
        else:
            time.sleep(SECONDS_FOR_RANK_0)
        return error.exit_code
    except BrokenPipeError:  # `... --help | head` closes the pipe early: no mistake of anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def find_rank(environ: Mapping[str, str]) -> int:
    """Returns this process's rank as its launcher states it; 0 if none does."""
    given = (environ.get(name, "") for name in RANK_VARIABLES)
    return next((int(text) for text in given if text.isdigit()), 0)


# ------------------------------------------------------------------------------------------------


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command not in COMMANDS:
        raise ConfigError(f"{command}: no such command; {nearest(command, COMMANDS)}")
    return COMMANDS[command](rest)


def _overview() -> str:
    lines = [f"  {name:<10} {_first_line(call)}" for name, call in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m fd_large COMMAND [--help] [flags]", "", "commands:", *lines]
    )


def _first_line(call: Callable[..., Any]) -> str:
    return (call.__doc__ or "").splitlines()[0]


def _train(arguments: list[str]) -> int:
    """Distil a recipe; the same as `deepspeed fd_large/train.py`, for one process.

    deepspeed fd_large/train.py --deepspeed_config JSON [--recipe NAME] [--section.field VALUE ...]
    """
    if "-h" in arguments or "--help" in arguments:
        if find_rank(os.environ) == 0:
            print_train_help(arguments)
        return 0
    run, flags = parse_train(arguments)
    if not flags.deepspeed_config:
        raise ConfigError(
            "--deepspeed_config: not given; got nothing, expected the path of a DeepSpeed JSON."
            " Pass --deepspeed_config ds_configs/zero3.json."
        )
    if flags.profile < 0:
        raise ConfigError(
            f"--profile: no number of steps; got {flags.profile}, expected 0 (no trace) or more."
            " Set --profile 3."
        )
    code = _train_run(
        run, deepspeed_config=flags.deepspeed_config, fresh=flags.fresh, profile=flags.profile
    )
    from fd_large import distributed

    if code == 0 and distributed.is_main():
        _tell_report(run.run_dir())
    return distributed.leave(code)


def _train_run(run: Run, *, deepspeed_config: str, fresh: bool = False, profile: int = 0) -> int:
    """Trains with everything that watches a run; returns the exit code."""
    terminal.take()
    # torch and deepspeed: seconds.
    from fd_large import distributed
    from fd_large.runtime import logs

    logs.start(find_rank(os.environ))
    from fd_large.engine.run import train
    from fd_large.tasks.jobs import job_of

    try:
        return train(run, job_of, deepspeed_config=deepspeed_config, fresh=fresh, profile=profile)
    except RuntimeError as error:
        if not distributed.peer_is_gone(error):
            raise
        raise LostRankError(
            "train: another rank has ended, its own message says why; got a closed connection, "
            "expected an answer. Start the same command again once that is mended."
        ) from error


def _tell_report(folder: str) -> None:
    """Draws a finished run's images and says what came out; never the reason that a run fails."""
    import logging

    from fd_large.report.make import make_report

    try:
        text = make_report(folder)
    except Exception:
        logging.getLogger(__name__).exception(
            "its report failed, the run stands: python -m fd_large report %s", folder
        )
        return
    terminal.console().print(f"\n{text}", soft_wrap=True)


def _recipes(arguments: list[str]) -> int:
    """List the runs of record: models, what they need, how long they take, what to expect."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: python -m fd_large recipes\n\n{_first_line(_recipes)}")
        return 0
    if arguments:
        raise ConfigError(
            f"recipes: takes no flags; got {' '.join(arguments)}, expected none. Leave them out."
        )
    from rich.console import Console

    # A pipe has no width of its own; 120 is what a page shows.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    Console(width=width).print(recipes_table())
    return 0


def _report(arguments: list[str]) -> int:
    """Draw a run's images and say what came out, from the files in its folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: python -m fd_large report RUN\n\n{_first_line(_report)}")
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(
            f"report: takes the folder of one run; got {' '.join(arguments) or 'nothing'}, expected"
            " RUN. Name it, for instance runs/quickstart."
        )
    from fd_large.report.make import make_report

    print(make_report(arguments[0]))
    return 0


def _weights(arguments: list[str]) -> int:
    """Say what a weights file holds, or write it in another format: weights inspect|convert."""
    from fd_large.cli import weights as command
    from fd_large.engine.checkpoint_models import serve_runs
    from fd_large.tasks.jobs import job_of

    serve_runs(job_of)
    return command.run(arguments)


def recipes_table() -> Any:
    """Returns the rich table of all runs of record, a block of lines each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, title="Runs of record (--recipe NAME)", title_justify="left")
    table.add_column("Recipe, teacher -> student", no_wrap=True)
    table.add_column("What it needs, how long it takes, what to expect", ratio=1)
    for name in registry.RECIPES:
        run, facts = registry.get(name), registry.facts(name)
        nets = f"\n{run.teacher.model}\n->" if run.has_teacher else f"\n{run.task.name}:"
        nets += f" {run.student.model}"
        said = f"needs:  {facts.hardware}\ntakes:  {facts.duration}\nexpect: {facts.result}"
        table.add_row(Text(name, style="bold").append(nets, style="not bold"), Text(said))
    return table


def _checkpoint(arguments: list[str]) -> int:
    """List, verify or prune a run's checkpoints; export to DeepSpeed's format, or import."""
    from fd_large.cli import checkpoint

    return checkpoint.main(arguments)


def _export(arguments: list[str]) -> int:
    """Write a run's student where timm or Hugging Face load it, with a model card."""
    from fd_large.cli import export

    return export.main(arguments)


def _predict(arguments: list[str]) -> int:
    """Draw what a run's detector sees in images, and write it as JSON."""
    from fd_large.cli import predict as detect

    return detect.main(arguments)


def _replay(arguments: list[str]) -> int:
    """Run a step that the guard refused again, on one device."""
    from fd_large.cli import replay

    return replay.main(arguments)


def _evaluate(arguments: list[str]) -> int:
    """Say what models are worth: neighbours, a linear probe, fine-tuning; or score detections."""
    from fd_large.cli import evaluate

    return evaluate.main(arguments, train=_train_run, rank=find_rank(os.environ))


def _diagnose(arguments: list[str]) -> int:
    """Show what models attend to, how flat their loss is and how alike their layers are."""
    from fd_large.cli import diagnose

    return diagnose.main(arguments)


def _plan(arguments: list[str]) -> int:
    """Plan a recipe on a cluster, without torch: memory, time, network, disk."""
    from fd_large.cli import plan

    return plan.main(arguments)


def _doctor(arguments: list[str]) -> int:
    """Say what a run finds on this machine, or on all nodes, and what to mend."""
    from fd_large.cli import doctor

    return doctor.main(arguments, speaks=find_rank(os.environ) == 0)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "recipes": _recipes,
    "plan": _plan,
    "report": _report,
    "checkpoint": _checkpoint,
    "weights": _weights,
    "export": _export,
    "doctor": _doctor,
    "replay": _replay,
    "predict": _predict,
    "evaluate": _evaluate,
    "diagnose": _diagnose,
}
