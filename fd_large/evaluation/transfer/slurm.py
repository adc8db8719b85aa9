"""Submits each training of `transfer --slurm` as a job, and a last job for the table."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.evaluation.transfer.cells import Cell
from fd_large.files import kind_of, write_json
from fd_large.recipes.fields import require
from fd_large.recipes.run import Run
from fd_large.runtime import terminal

RUN_FILE = "run.json"
"""Name of the file with a job's recipe, in the folder of the run."""
TRAINING, TABLE = "transfer.sh", "transfer_table.sh"
# Options that hold for the last job too, which needs no GPUs.
_OF_ALL = ("account", "partition", "qos")
_OPTION = re.compile(r"[a-z][a-z-]*(=.+)?")


def check_options(options: Sequence[str]) -> None:
    """Refuses `options` that do not have the form of sbatch options without their dashes.

    The form is NAME=VALUE, as in nodes=2.

    Raises: ConfigError: with the first option of another form.
    """
    for option in options:
        require(
            bool(_OPTION.fullmatch(option)),
            "--sbatch: not an option of sbatch",
            repr(option),
            "NAME=VALUE without dashes, such as nodes=2 or partition=gpu",
        )


def script(name: str) -> str:
    """Returns the path of the batch script `name`, which is slurm/NAME or NAME.

    Both are relative to the current folder; the first one that exists is returned.

    Raises: ConfigError: if neither exists.
    """
    for path in (Path("slurm") / name, Path(name)):
        if kind_of(path) == "file":
            return str(path)
    raise ConfigError(
        f"--slurm: no {name} here; got {Path.cwd()}, expected the repository or the folder of the "
        "Slurm scripts. Write the scripts to a folder: python -m fd_large init DIR."
    )


def submit_training(
    run: Run,
    *,
    deepspeed_config: str,
    options: Sequence[str],
    environ: Mapping[str, str],
) -> int:
    """Submits the training of a run as a Slurm job; returns the job's id.

    Args:
        run: The recipe.
        deepspeed_config: DeepSpeed's JSON, a name or a path.
        options: Options of sbatch, without their dashes.
        environ: The environment variables that the job inherits.

    Raises:
        ConfigError: If sbatch refuses the job, or if the recipe names code that this process may
            not import, since a job must not run more code than this process may.
    """
    own_code = [name for name in run.code() if doors.is_own(name)]
    doors.require_allowed({name: name for name in own_code})
    folder = Path(run.run_dir())
    write_json(folder / RUN_FILE, run.to_dict())
    # The recipe's paths are repeated as flags, since the script checks them on every node.
    named = {
        "config": folder / RUN_FILE,
        "deepspeed_config": deepspeed_config,
        "data.root": run.data.root,
        "runtime.run_dir": folder,
    }
    if run.student.init:
        named["student.init"] = run.student.init
    words = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
    if own_code:
        words += ["--allow_code", *own_code]
    job_options = [f"job-name={'-'.join(folder.parts[-3:])}", f"output={folder}/slurm-%j.out"]
    return _sbatch([*job_options, *options], script(TRAINING), words, environ)


def submit_table(
    out: str, jobs: Iterable[int], *, options: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Submits the job that makes the table once other jobs have ended; returns the job's id.

    Args:
        out: The folder of the table.
        jobs: Ids of the other jobs.
        options: Options of sbatch, without their dashes.
        environ: The environment variables that the job inherits.
    """
    after = [f"dependency=afterany:{':'.join(map(str, jobs))}", f"output={out}/slurm-%j.out"]
    common = [option for option in options if option.partition("=")[0] in _OF_ALL]
    return _sbatch([*after, *common], script(TABLE), ["--out", out], environ)


def submit(cells: Sequence[Cell], flags: Any, environ: Mapping[str, str]) -> bool:
    """Submits the trainings of cells and the job for the table, and prints the jobs.

    Args:
        cells: Unfinished cells. A cell whose job is waiting or running is not submitted again.
        flags: Flags of the command.
        environ: The environment variables that the jobs inherit.

    Returns: whether there are jobs to wait for.
    """
    jobs: list[int] = []
    console = terminal.console()
    for cell in cells:
        recorded = cell.recorded
        job = recorded.read().get("job", 0)
        before = job and is_queued(job)
        if not before:
            recorded.write()
            job = submit_training(
                recorded.run,
                deepspeed_config=flags.deepspeed_config,
                options=flags.sbatch,
                environ=environ,
            )
            recorded.write(job=job)
        note = ", submitted before" if before else ""
        console.print(f"{recorded.folder}: job {job}{note}", soft_wrap=True)
        jobs.append(job)
    if jobs:
        last = submit_table(flags.out, jobs, options=flags.sbatch, environ=environ)
        console.print(
            f"{flags.out}: job {last} makes the table once these jobs have ended", soft_wrap=True
        )
    return bool(jobs)


def is_queued(job: int) -> bool:
    """Whether a Slurm job is waiting or running.

    Args:
        job: Id of the job.
    """
    done = _call(["squeue", "--noheader", "--format=%A", f"--jobs={job}"])
    return done.returncode == 0 and bool(done.stdout.strip())


# ------------------------------------------------------------------------------------------------


def _sbatch(
    options: Sequence[str], path: str, words: Sequence[str], environ: Mapping[str, str]
) -> int:
    flags = [f"--{option}" for option in options]
    done = _call(["sbatch", "--parsable", *flags, path, *words], environ)
    number = done.stdout.strip().partition(";")[0]
    if done.returncode or not number.isdigit():
        answer = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise ConfigError(
            f"--slurm: sbatch refused the job; got {answer[-1]}, expected the number of the job. "
            "Change --sbatch or site.sh; jobs submitted before are not cancelled."
        )
    return int(number)


def _call(
    words: list[str], environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environ)
    except FileNotFoundError:
        raise ConfigError(
            f"--slurm: no command {words[0]} on this machine; got a machine without Slurm, "
            "expected a machine that submits jobs. Leave --slurm out, or start the command on "
            "such a machine."
        ) from None
