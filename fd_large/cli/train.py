"""The command `fd-large train`, which trains a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fd_large import doors, imports
from fd_large.cli.arguments import AllowsCode, TakesRunFile, WithRecipe, parse_with_recipe
from fd_large.cli.ownership import owning
from fd_large.cli.paths import (
    paths_of,
    require_apart,
    require_contents,
    require_paths,
    require_sources,
)
from fd_large.data.roots import check_packages
from fd_large.engine.zero import config as ds
from fd_large.errors import Exit, FDError, LostRankError, check_all
from fd_large.files import check_out, kind_of
from fd_large.ranks import activity
from fd_large.ranks.launch import check_accelerator
from fd_large.ranks.processes import check_workers
from fd_large.recipes import registry
from fd_large.recipes.batch_sizes import check_division
from fd_large.recipes.fields import at_least
from fd_large.recipes.file_names import RECIPE
from fd_large.recipes.run import Run
from fd_large.recipes.small_data import Images, fit, fitted_fields
from fd_large.recipes.stored import require_same_settings, with_stored_ends
from fd_large.recipes.tables import keys_of
from fd_large.recipes.task_kind import check_metric
from fd_large.runtime import terminal

_Table = tuple[str, doors.Kind, str, str]
# The field, what it names, and the file of the package with the table.
_OPTIMISERS: _Table = ("optim.name", "optimisers", "engine/zero/optimizer.py", "OPTIMISERS")
_TRACKERS: _Table = ("runtime.trackers", "trackers", "runtime/trackers.py", "TRACKERS")

# What `train --help` shows; `train --help SECTION` has the rest.
_OFTEN = {
    "deepspeed_config": "DeepSpeed's JSON: zero1, zero2, zero3, ... or a path",
    "recipe": "the run of record to start from; `recipes` lists them",
    "config": "a run file: YAML or JSON with fields of a recipe",
    "fresh": "start anew although the run's folder holds checkpoints",
    "check": "check the settings for this number of ranks only",
    "profile": "steps to trace with torch's profiler, into RUN/profile/",
    "allow_code": "Python files of yours that a stored recipe may name",
    "student.model": "the model that is trained; `models` lists them",
    "student.init": "weights to start from: a file or a run",
    "teacher.model": "the frozen model; auto: the model of its weights",
    "teacher.source": "the weights: a file, a folder, timm:, hf: or open_clip:NAME",
    "data.root": "training images: folder, tars, parquet or URL",
    "data.image_size": "side of the crop in pixels",
    "batch.global_batch_size": "images in a step, over all ranks",
    "batch.micro_batch_size": "images in one pass on a rank",
    "optim.base_lr": "peak learning rate per 512 images",
    "optim.epochs": "passes over the images",
    "optim.max_steps": "steps of the run, instead of epochs",
    "eval.root": "held-out images",
    "runtime.run_dir": "folder of the run; empty: runs/RECIPE",
    "runtime.trackers": "tensorboard, wandb, mlflow or your own",
}


@dataclass(frozen=True, kw_only=True)
class Train(TakesRunFile, AllowsCode):
    """Train a recipe. A recipe gives every field its value; flags override field by field.

    On several GPUs: deepspeed fd_large/train.py, with the same flags.
    """

    # Name of the recipe, whose values are the defaults of the recipe's fields below. If it is left
    # out: quickstart.
    recipe: str = registry.DEFAULT_RECIPE
    # DeepSpeed's JSON: a name (zero1, zero2, zero3, zero3_hpz, ...) or a path.
    deepspeed_config: str
    # Start a new run, although the folder of the run holds checkpoints.
    fresh: bool = False
    # Number of steps that torch's profiler traces, after the first three steps, into
    # RUN/profile/. 0 turns the profiler off.
    profile: int = 0
    # Number of ranks for which the settings are checked, as far as one process without torch can
    # check them; nothing is trained. 0 trains.
    check: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--profile", self.profile, 0, "steps")
        at_least("--check", self.check, 0, "ranks")


def main(arguments: list[str]) -> int:
    """Trains a run and prints its report; returns the exit code.

    With --check it only checks the settings, and trains nothing.
    """
    parsed, run, named = checked(arguments)
    if parsed.own.check:
        _check_for_ranks(run, parsed.own.check, named, fresh=parsed.own.fresh)
        return 0
    code = train_run(
        run,
        deepspeed_config=parsed.own.deepspeed_config,
        fresh=parsed.own.fresh,
        profile=parsed.own.profile,
        then=show_report,
        named=named,
    )
    from fd_large.ranks import distributed

    if code == Exit.AGAIN and distributed.is_main():
        say_how_to_go_on(run)
    return distributed.leave(code)


def checked(arguments: list[str]) -> tuple[WithRecipe[Train], Run, set[str]]:
    """Parses and checks the arguments of `train`, without importing torch.

    Returns: the parsed arguments, the recipe, and the names of the fields that the user set.

    Raises: FDError: with a line for each mistake in the arguments or in the recipe.
    """
    parsed = parse_train(arguments)
    run, named = parsed.run, {*parsed.fields, *parsed.in_file}
    if not parsed.own.fresh:
        run = with_stored_ends(run, named)
    check_names(run, deepspeed_config=parsed.own.deepspeed_config)
    return parsed, run, named


def check_names(run: Run, *, deepspeed_config: str) -> None:
    """Refuses mistakes that can be found without torch.

    It checks the names of files, folders, datasets, teachers, losses, heads, optimisers and so on,
    the number of loader processes, and DeepSpeed's JSON. A mistyped path or name is thus reported
    before torch and weights are loaded, which takes seconds.

    Raises: FDError: with a line for each mistake.
    """
    roots = {"data.root": run.data.root, "eval.root": run.eval.root}
    roots["eval.knn_root"] = run.eval.knn_root
    caches = [run.data.cache] if run.data.cache else []
    check_all(
        check_accelerator,
        *(partial(check_out, path, where="--data.cache", holds="folder") for path in caches),
        partial(_check_config, run, deepspeed_config),
        partial(check_workers, run.data.workers),
        lambda: require_paths(paths_of(run)),
        partial(require_sources, run),
        partial(require_names, run),
        partial(require_contents, run),
        *(partial(check_packages, root, where=where) for where, root in roots.items()),
    )


def _check_for_ranks(run: Run, ranks: int, named: Collection[str], *, fresh: bool) -> None:
    """Refuses mistakes that would end a run on `ranks` ranks before its first step.

    If there is no mistake, the numbers of images in a step and in a micro-batch are printed. The
    names of the fields that the user set are `named`. With `fresh` (--fresh) the folder may hold a
    run of other settings.
    """
    require_apart(run, fresh=fresh)
    if not fresh:
        require_same_settings(run)
    batch, size = run.batch.global_batch_size, run.batch.micro_batch_size
    field = "batch.global_batch_size"
    if field not in named and field in _to_fit(run, fresh=fresh):
        images = "the size of the dataset decides the images per step"
    else:
        check_division(
            global_batch_size=batch,
            micro_batch_size=1 if size == "auto" else size,
            world_size=ranks,
        )
        images = f"{batch} images per step"
    print(f"{run.name}: no mistake found for {ranks} ranks; {images}, {size} per micro-batch")


def require_names(run: Run) -> None:
    """Refuses unknown names of optimisers, trackers, metrics and parts of the task.

    Raises: ConfigError: with a line for each unknown name.
    """
    kind = run.task.kind()  # None for code that this process may not import.
    named = [(run.optim.name, *_OPTIMISERS)]
    named += [(name, *_TRACKERS) for name in run.runtime.trackers]
    checks: list[Callable[[], None]] = [partial(_require, *entry) for entry in named]
    if kind and kind.check_names:
        checks.append(partial(kind.check_names, run))
    if kind and kind.metrics and run.eval.best_metric:
        checks.append(partial(check_metric, run.eval.best_metric, kind.metrics(run)))
    check_all(*checks)


def _require(name: str, where: str, kind: doors.Kind, file: str, table: str) -> None:
    doors.require_known(name, kind=kind, where=where, built_in=keys_of(file, table))


def _check_config(run: Run, deepspeed_config: str) -> None:
    """Refuses a DeepSpeed JSON that contradicts the recipe.

    Settings that depend on the number of ranks or on the device are not checked here.
    """
    precision = run.engine.precision
    ds.check_owned(
        ds.load(deepspeed_config),
        clip_norm=run.optim.clip_norm,
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=run.batch.micro_batch_size,
        accumulation=None,
        bfloat16=None if precision == "auto" else precision == "bfloat16",
        nvme_path=run.engine.nvme_path,
    )


def train_run(
    run: Run,
    *,
    deepspeed_config: str,
    fresh: bool = False,
    profile: int = 0,
    then: Callable[[str], None] | None = None,
    named: Collection[str] | None = None,
) -> int:
    """Owns the run's folder, trains the run and returns the exit code.

    Every rank has to call this function. `Train` describes `deepspeed_config`, `fresh` and
    `profile`.

    Args:
        then: Function that rank 0 calls with the folder of each finished student, while the run
            still owns its folder.
        named: Full names of the fields that the user set; the other fields may be fitted to the
            images (`small_data.fit`). None to fit no field.

    Raises: FDError: for a mistake of the user's, or if another rank has ended.
    """
    require_apart(run, fresh=fresh)
    if not fresh:
        require_same_settings(run)
    with owning(run.run_dir()) as lease:
        with activity.work("loading DeepSpeed"), imports.for_good("deepspeed"):
            from fd_large.engine.run import train
            from fd_large.ranks import distributed, failures
            from fd_large.tasks.jobs import job_of

        if named is not None:
            run = _fitted(run, named, fresh=fresh)
        try:
            code = train(
                run,
                job_of,
                deepspeed_config=deepspeed_config,
                lease=lease,
                fresh=fresh,
                profile=profile,
            )
        except RuntimeError as error:
            if not distributed.peer_is_gone(error):
                raise
            lost = failures.heard()
            reason = str(lost) if lost else "that rank's message says why"
            lost_rank = LostRankError(
                "train: another rank has ended; got a closed connection, expected an answer "
                f"({reason}). Start the same command again once that is fixed."
            )
            lost_rank.exit_code = failures.code_after(lost)
            lost_rank.rank_local = failures.speaks_for(lost)
            raise lost_rank from error
        if then and code == 0 and distributed.is_main():
            for student in run.each_student().values():
                then(student.run_dir())
        return code


def _to_fit(run: Run, *, fresh: bool) -> tuple[str, ...]:
    """Returns the names of the recipe's fields whose values are to be fitted to the images.

    The result is () if the run resumes: its folder has a recipe, and `fresh` is False.
    """
    stored = Path(run.run_dir()) / RECIPE
    is_new = fresh or kind_of(stored, where="--runtime.run_dir") != "file"
    return fitted_fields(run) if is_new else ()


def _fitted(run: Run, named: Collection[str], *, fresh: bool) -> Run:
    """Returns `run` with some fields fitted to its images by `small_data.fit`; logs their values.

    A run that resumes is returned unchanged. So is a run whose images cannot be opened; this
    mistake is reported when the run is opened. Fields in `named` (full names), which the user set,
    stay unchanged.
    """
    if not _to_fit(run, fresh=fresh):
        return run
    from fd_large.data.folder import ImageFolder
    from fd_large.data.labelled import evaluation_part, has_parts, open_training
    from fd_large.ranks import distributed

    root = run.data.root
    try:
        samples = open_training(root)
        tested = evaluation_part(root) if has_parts(root) else ""
    except FDError:
        return run
    can_divide = isinstance(samples, ImageFolder) and not tested
    images = Images(len(samples), can_divide=can_divide, tested=tested)
    run, line = fit(run, images, distributed.world_size(), named)
    logging.getLogger(__name__).info("%s: %s", run.name, line)
    return run


def parse_train(arguments: list[str]) -> WithRecipe[Train]:
    """Parses the arguments after `train`."""
    return parse_with_recipe(
        Train, arguments, command="train", recipe=registry.DEFAULT_RECIPE, often=_OFTEN
    )


def say_how_to_go_on(run: Run) -> None:
    """Logs the progress of the stopped run `run`, and the command that resumes it.

    If its files cannot be read, that is logged instead, and no error is raised.
    """
    from fd_large.report.closing import stopped_text
    from fd_large.report.run_files import read_run
    from fd_large.runtime.logs import WHOLE_LINES

    log = logging.getLogger(__name__)
    try:
        # All students of a run have the same command.
        students = [read_run(student.run_dir()) for student in run.each_student().values()]
        stopped = [files for files in students if files.summary.get("status") != "done"]
        log.info("%s", stopped_text((stopped or students)[0]), extra=WHOLE_LINES)
    except FDError as error:
        log.error(
            "the run is saved, and the same command resumes it; its progress is unknown: %s", error
        )
    except Exception:
        log.exception("the run is saved, and the same command resumes it; its progress is unknown")


def show_report(folder: str) -> None:
    """Draws the curves of the finished run in `folder`, and prints its results.

    An error is logged and not raised.
    """
    from fd_large.report.make import make_report

    try:
        text = make_report(folder)
    except FDError as error:
        logging.getLogger(__name__).error("the report failed, but the run is complete: %s", error)
        return
    except Exception:
        logging.getLogger(__name__).exception(
            "the report failed, but the run is complete; to make the report: python -m "
            "fd_large report %s",
            folder,
        )
        return
    terminal.console().print(f"\n{text}", soft_wrap=True)
