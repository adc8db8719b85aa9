"""Words to calls: `python -m fd_large COMMAND` and `fd_large/train.py`.

Flags come from the dataclasses of `recipes/sections.py` through tyro; none is written here twice.
torch is imported only once a command needs it, so that help, tables and the user's mistakes
answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, make_dataclass, replace
from difflib import get_close_matches
from io import StringIO
from typing import Any, get_type_hints

from fd_large.errors import ConfigError, FDError, LostRankError, nearest
from fd_large.recipes import registry
from fd_large.recipes.fields import describe_type, field_names
from fd_large.recipes.run import Run
from fd_large.runtime import terminal

# Whoever started the ranks sets one of these; torch must not be needed to find rank 0.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

# A launcher ends all ranks when the first one exits: the silent ones let rank 0 speak before.
SECONDS_FOR_RANK_0 = 2.0


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a recipe. A recipe gives every field its value; flags override field by field."""

    recipe: str = registry.DEFAULT_RECIPE
    """Run of record whose values are the defaults below; without it quickstart."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON, for instance ds_configs/zero3.json; needed."""
    fresh: bool = False
    """Start anew although the folder of the run holds checkpoints."""
    profile: int = 0
    """Updates to trace with torch's profiler, after three others; RUN/profile/ gets the trace."""
    local_rank: int = -1
    """Passed by the deepspeed launcher; ignored."""


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


def parse_train(arguments: list[str]) -> tuple[Run, TrainFlags]:
    """Turns the words after `train` into a run and the flags beside it.

    Raises:
        ConfigError: A recipe, field or value that does not exist or does not fit.
    """
    words = _group(arguments)
    run = _recipe(words)
    flags_type = _flags_type(run)
    known = field_names(flags_type)
    words = _switches(words, known)
    for name in words:
        if name not in known and known.get(_switched_on(name)) is not bool:
            raise ConfigError(f"--{name}: no such field; {_nearest_field(name, known)}")
    parsed = _tyro(flags_type, _ungroup(words))
    if parsed is None:
        bad = next((n for n, v in words.items() if not _parses_alone(flags_type, n, v)), "")
        got = " ".join(words.get(bad, [])) or "nothing"
        raise ConfigError(
            f"--{bad}: a value of the wrong type; got {got}, expected"
            f" {describe_type(known.get(bad, str))}. Mend the value."
        )
    sections = {f.name: getattr(parsed, f.name) for f in fields(Run) if f.name != "name"}
    return replace(run, **sections), parsed


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
        return _print_train_help(arguments)
    run, flags = parse_train(arguments)
    if not flags.deepspeed_config:
        raise ConfigError(
            "--deepspeed_config: not given; got nothing, expected the path of a DeepSpeed JSON."
            " Pass --deepspeed_config ds_configs/zero3.json."
        )
    if flags.profile < 0:
        raise ConfigError(
            f"--profile: no number of updates; got {flags.profile}, expected 0 (no trace) or more."
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
    from fd_large.runtime.canary import Canary
    from fd_large.runtime.guard import Guard
    from fd_large.runtime.meter import Meter
    from fd_large.runtime.pictures import Pictures
    from fd_large.runtime.preemption import Preemption
    from fd_large.runtime.progress import Progress
    from fd_large.runtime.tensorboard import TensorBoard
    from fd_large.runtime.watchdog import Watchdog

    logs.start(find_rank(os.environ))
    from fd_large.engine.run import train
    from fd_large.jobs import job_of

    progress, board = Progress(), TensorBoard()
    # The meter is asked first: at the end it hands the others its last rows.
    meter = Meter(on_rows=[progress.show_rows, board.write_rows])
    hooks = [meter, progress, board, Pictures()]
    if run.guard.enabled:
        hooks.append(Guard())
    if run.runtime.preemption:
        hooks.append(Preemption())
    if profile:
        from fd_large.runtime.profiler import Profiler

        hooks.append(Profiler(profile))
    if run.runtime.canary_every and run.has_teacher:
        hooks.append(Canary(run.runtime.canary_every))
    if run.runtime.watchdog_seconds:
        # The last one: what the others do at the end is watched as well.
        hooks.append(Watchdog())
    try:
        return train(run, job_of, deepspeed_config=deepspeed_config, fresh=fresh, hooks=hooks)
    except RuntimeError as error:
        if not distributed.peer_is_gone(error):
            raise
        raise LostRankError(
            "train: another rank has ended, its own message says why; got a closed connection, "
            "expected an answer. Start the same command again once that is mended."
        ) from error


def _tell_report(folder: str) -> None:
    """Draws a finished run's pictures and says what came out; never the reason that a run fails."""
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


def _print_train_help(arguments: list[str]) -> int:
    words = _group([word for word in arguments if word not in ("-h", "--help")])
    flags_type = _flags_type(_recipe(words))
    if find_rank(os.environ) == 0:
        import tyro

        with suppress(SystemExit):
            tyro.cli(flags_type, args=["--help"], prog="fd_large/train.py", use_underscores=True)
    return 0


def _recipes(arguments: list[str]) -> int:
    """List the runs of record: nets, what they need, how long they take, what to expect."""
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
    """Draw a run's pictures and say what came out, from the files in its folder."""
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
    from fd_large.checkpoint.student import serve_runs
    from fd_large.weights import command

    serve_runs()
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
    from fd_large.commands import checkpoint

    return checkpoint.main(arguments)


def _export(arguments: list[str]) -> int:
    """Write a run's student where timm or Hugging Face load it, with a model card."""
    from fd_large.commands import export

    return export.main(arguments)


def _predict(arguments: list[str]) -> int:
    """Draw what a run's detector sees in pictures, and write it as JSON."""
    from fd_large.commands import detect

    return detect.main(arguments)


def _replay(arguments: list[str]) -> int:
    """Run a step that the guard refused again, on one device."""
    from fd_large.commands import replay

    return replay.main(arguments)


def _evaluate(arguments: list[str]) -> int:
    """Say what nets are worth: neighbours, a linear probe, fine-tuning; or score detections."""
    from fd_large.commands import evaluate

    return evaluate.main(
        arguments,
        parse=lambda words: parse_train(words)[0],
        train=_train_run,
        rank=find_rank(os.environ),
    )


def _diagnose(arguments: list[str]) -> int:
    """Show what nets attend to, how flat their loss is and how alike their layers are."""
    from fd_large.commands import diagnose

    return diagnose.main(arguments)


def _plan(arguments: list[str]) -> int:
    """Plan a recipe on a cluster, without torch: memory, time, network, disk."""
    from fd_large.commands import plan

    return plan.main(arguments, lambda words: parse_train(words)[0])


def _doctor(arguments: list[str]) -> int:
    """Say what a run finds on this machine, or on all nodes, and what to mend."""
    from fd_large.commands import doctor

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


def _flags_type(run: Run) -> type[TrainFlags]:
    """The flags of `train` as a dataclass: the plain ones, then the sections with run's values."""
    hints = get_type_hints(Run)
    sections = [
        (f.name, hints[f.name], field(default=getattr(run, f.name)))
        for f in fields(Run)
        if f.name != "name"
    ]
    named = TrainFlags(recipe=run.name)
    plain = [
        (f.name, get_type_hints(TrainFlags)[f.name], field(default=getattr(named, f.name)))
        for f in fields(TrainFlags)
    ]
    return make_dataclass(
        "Train", [*plain, *sections], bases=(TrainFlags,), frozen=True, kw_only=True
    )


def _group(arguments: list[str]) -> dict[str, list[str]]:
    """Splits words at the flags: {"student.architecture.depths": ["2", "2"]}; the last one wins."""
    words: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            # A later flag replaces an earlier one: scripts append the user's overrides.
            name = name.replace("-", "_")
            words.pop(name, None)
            words[name] = values
        elif values is None:
            raise ConfigError(
                f"train: a word without a flag; got {word!r}, expected --section.field VALUE."
                " Name the field before the value."
            )
        else:
            values.append(word)
    return words


def _switches(words: dict[str, list[str]], known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Puts `--guard.enabled False` as tyro wants it, `--guard.no_enabled`."""
    turned = {}
    for name, values in words.items():
        if known.get(name) is bool and values in (["True"], ["False"]):
            section, dot, switch = name.rpartition(".")
            name = name if values == ["True"] else f"{section}{dot}no_{switch}"
            values = []
        turned[name] = values
    return turned


def _switched_on(name: str) -> str:
    section, dot, switch = name.rpartition(".")
    return f"{section}{dot}{switch.removeprefix('no_')}"


def _recipe(words: Mapping[str, list[str]]) -> Run:
    return registry.get(" ".join(words.get("recipe", [registry.DEFAULT_RECIPE])))


def _ungroup(words: dict[str, list[str]]) -> list[str]:
    return [word for name, values in words.items() for word in (f"--{name}", *values)]


def _nearest_field(name: str, known: Mapping[str, Any]) -> str:
    if "." not in name:  # A field typed without its section.
        whole = [field_name for field_name in known if field_name.split(".")[-1] == name]
        if whole:
            return f"nearest: {', '.join(whole[:3])}"
    # A near miss is told alone; the wider net of `nearest` is for words that are further off.
    close = get_close_matches(name, known, n=2, cutoff=0.85)
    return f"nearest: {', '.join(close)}" if close else nearest(name, known)


def _parses_alone(flags_type: type[TrainFlags], name: str, values: list[str]) -> bool:
    """Whether a flag's words are of its type; that it fits no other field is another matter."""
    try:
        return _tyro(flags_type, _ungroup({name: values})) is not None
    except ConfigError:
        return True


def _tyro(flags_type: type[TrainFlags], arguments: list[str]) -> Any | None:
    """Parses silently; None if tyro refuses, so that the mistake is told in one sentence."""
    import tyro

    # Its boxes go to stderr even with console_outputs=False.
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        try:
            return tyro.cli(flags_type, args=arguments, console_outputs=False, use_underscores=True)
        except SystemExit:
            return None
