"""Search over recipes, learning rates and layer decays on held-out images, for `--sweep`.

A small change of the learning rate or the recipe changes a score by more than models differ, and
the best values depend on the model. So every model is trained on the same grid: by each recipe
that is published for any of the models, at each learning rate and layer decay of the flags, and
at the recipe's own values. Random weights have no layer decay. A trial trains on nine tenths of
the training images and is tested on the rest, which a hash of the file names chooses
(data/val_fraction.py). Training with the best setting then uses all training images and every
seed, and only these runs are tested on the test images.

Each trial is a separate run below OUT/sweep. A finished trial leaves its score in a record but no
checkpoints, so that the same command, started again, continues where it stopped. A folder with a
different trial is refused. A diverged trial is finished, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fd_large.errors import ConfigError, Exit
from fd_large.evaluation.held_out import NOTHING_SEEN, Seen, seen_by
from fd_large.evaluation.recorded_runs import RecordedRun
from fd_large.recipes.fields import override, require
from fd_large.recipes.file_names import CHECKPOINTS
from fd_large.recipes.run import Run

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel
    from fd_large.tasks.transfer import Divisible

HELD_OUT = 0.1
"""Fraction of the training images on which trials are tested."""


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Flags of `evaluate` and `transfer` for the sweep before a training."""

    # Choose learning rate and layer decay for each model before its training. The recipes of all
    # models are tried at several learning rates and layer decays, each trial is tested on a
    # held-out tenth of the training images, and the best setting trains on all training images.
    sweep: bool = False
    # Learning rates of the sweep, as multiples of the peak learning rate of each recipe. The
    # factor 1 is always tried.
    sweep_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    # Layer decays of the sweep (optim.layer_decay). The layer decay of each recipe is always tried.
    # Models with random weights are tried with that of the recipe alone.
    sweep_decays: tuple[float, ...] = (0.6, 0.7, 0.8)

    def __post_init__(self) -> None:
        require(
            bool(self.sweep_rates) and min(self.sweep_rates) > 0,
            "--sweep_rates: invalid multiples",
            self.sweep_rates,
            "numbers above 0",
        )
        require(
            bool(self.sweep_decays) and 0 < min(self.sweep_decays) <= max(self.sweep_decays) <= 1,
            "--sweep_decays: invalid factors",
            self.sweep_decays,
            "numbers in (0, 1]",
        )
        usual = SweepFlags.sweep_rates, SweepFlags.sweep_decays
        require(
            self.sweep or (self.sweep_rates, self.sweep_decays) == usual,
            "--sweep: missing, although a grid of the sweep is given",
            f"{self.sweep_rates} and {self.sweep_decays}",
            "--sweep too",
            "Add --sweep",
        )


class Metric(NamedTuple):
    """Score by which a sweep chooses the best trial.

    Attributes:
        key: Name of the score in trial.json and summary.json.
        of: Function from the content of a trial's summary.json to the score on the held-out images,
            or None without a score.
        lower_is_better: Whether a lower score is better.
    """

    key: str
    of: Callable[[Mapping[str, Any]], float | None]
    lower_is_better: bool = False


class Trial(NamedTuple):
    """Training of one point of the grid.

    Attributes:
        rate: Multiple of the learning rate of the trial's recipe.
        decay: The layer decay.
        recorded: The trial's run, whose inputs are `images`, the fingerprint of the training
            images, and `weights`, the digest of the initial weights.
        score: Score on the held-out images; None if the trial is not trained yet, diverged, or has
            no score.
    """

    rate: float
    decay: float
    recorded: RecordedRun
    score: float | None = None

    @property
    def recipe(self) -> str:
        """Name of the trial's recipe."""
        return self.recorded.run.name


@dataclass(frozen=True)
class Sweep:
    """Results of a sweep for one model.

    Attributes:
        trials: The trials of the grid, ordered by recipe, then by rising rate and rising decay.
        metric: The score by which the best trial is chosen.
        seen: Trainings behind the model's weights that may have used the held-out images.
    """

    trials: tuple[Trial, ...]
    metric: Metric
    seen: Seen = NOTHING_SEEN

    @property
    def winner(self) -> Trial:
        """The trial with the best score, or the first of several with the same score."""
        ended = (trial for trial in self.trials if trial.score is not None)
        best = min if self.metric.lower_is_better else max
        return best(ended, key=lambda trial: trial.score or 0.0)

    def best_of(self, recipes: Sequence[Run], named: Collection[str]) -> Run:
        """Returns the recipe of the best trial, with its rate and its decay.

        Args:
            recipes: The recipes of the sweep for this model.
            named: Full names of the fields that the user set.
        """
        (recipe,) = (run for run in recipes if run.name == self.winner.recipe)
        return with_point(recipe, self.winner.rate, self.winner.decay, named)

    def at_edge(self) -> list[str]:
        """Returns which settings of the best trial are at an edge of the grid.

        The result has "rate" if the learning rate is the lowest or highest of several, and "decay"
        if the layer decay is. Beyond the edge there may be a better value. A layer decay of 1 is no
        edge, since it is the largest that makes sense.
        """
        beside = [trial for trial in self.trials if trial.recipe == self.winner.recipe]
        rates, decays = {trial.rate for trial in beside}, {trial.decay for trial in beside}
        rate, decay, *_ = self.winner
        edges = {
            "rate": len(rates) > 1 and rate in (min(rates), max(rates)),
            # A layer decay of 1 is the largest that makes sense.
            "decay": len(decays) > 1 and decay in {min(decays), max(decays)} - {1.0},
        }
        return [name for name, is_edge in edges.items() if is_edge]

    def as_json(self) -> dict[str, Any]:
        """Returns the entry of the sweep in summary.json, with the best trial and all trials."""
        return {
            **self._as_json(self.winner),
            "at_edge": self.at_edge(),
            "held_out_seen_by": list(self.seen.by),
            "held_out_not_known": list(self.seen.not_known),
            "trials": [self._as_json(trial) for trial in self.trials],
        }

    def _as_json(self, trial: Trial) -> dict[str, Any]:
        optim = trial.recorded.run.optim
        return {
            "recipe": trial.recipe,
            "rate": trial.rate,
            "base_lr": optim.base_lr,
            "layer_decay": optim.layer_decay,
            self.metric.key: trial.score,
            "run": str(trial.recorded.folder),
        }


def check_fields(changes: Mapping[str, Any]) -> None:
    """Refuses fields of a recipe that the user may not set together with --sweep.

    Args:
        changes: The fields that the user set, {full name: value}.

    Raises: ConfigError: with a line for each of these fields.
    """
    mistakes = {
        "optim.layer_decay": "the sweep decides it; got a value of your own, expected no value. "
        "Set --sweep_decays.",
        **dict.fromkeys(
            ("eval.best_metric", "eval.patience"),
            "the final runs would be chosen by the test images; got a value of your own, expected "
            "no value. Leave the field out.",
        ),
        "data.val_fraction": "the sweep holds out a part of the training images by itself; got a "
        "value of your own, expected no value, and separate test images. "
        "Leave the field out.",
    }
    lines = [f"--{name}: {mistake}" for name, mistake in mistakes.items() if changes.get(name)]
    if lines:
        raise ConfigError("\n".join(lines))


def settings_of(flags: SweepFlags) -> dict[str, Any]:
    """Returns the entries of summary.json that describe a sweep.

    These are the grid of learning rates and layer decays in `flags`, and the fraction of the
    training images that the trials hold out.
    """
    grid = {"sweep_rates": list(flags.sweep_rates), "sweep_decays": list(flags.sweep_decays)}
    return {**grid, "sweep_held_out": HELD_OUT}


def sweep(
    models: Sequence[NamedModel],
    recipes: Sequence[Sequence[Run]],
    flags: Any,
    train: Callable[[Run], tuple[int, dict[str, Any]]],
    named: Collection[str],
    metric: Metric,
    *,
    column: str = "",
) -> tuple[int, list[Sweep]]:
    """Trains the trials of every model's grid that are not finished.

    Every rank has to call this function.

    Args:
        models: The models.
        recipes: The recipes to try for each model, which all start from the model's weights.
        flags: The command's arguments, with the grid, the number of seeds and `out`.
        train: Function that trains a run, and returns the exit code and the content of its
            summary.json.
        named: Full names of the fields that the user set.
        metric: The score by which the best trial is chosen.
        column: Name of a folder for the trials in OUT/sweep; "" for OUT/sweep itself.

    Returns: the exit code, and the results of each model, or none if the code is not 0.

    Raises: FDError: if the images cannot be divided, or all trials of a model diverge.
    """
    from fd_large.engine.find_model import slug
    from fd_large.engine.node_consistency import weights_digest
    from fd_large.ranks import distributed, meeting
    from fd_large.runtime import logs, terminal
    from fd_large.tasks.jobs import job_of, transfer_of

    logs.start(distributed.start().rank)
    first = _held_out(recipes[0][0], recipes[0][0].data.root, Path())
    images = meeting.meet(lambda: transfer_of(first.task.name).divisible(job_of(first)))
    pairs = list(zip(models, recipes, strict=True))
    digests = meeting.meet(
        lambda: [weights_digest(tried[0].student.init, model.weights) for model, tried in pairs]
    )
    seen_of_each = distributed.of_main(
        lambda: [seen_by(tried[0].student.init, images.folder, HELD_OUT) for _, tried in pairs]
    )
    folder = Path(flags.out) / "sweep" / column
    grids = [
        _trials_of(
            tried, flags, named, images=images, weights=digest, folder=folder / slug(model.label)
        )
        for (model, tried), digest in zip(pairs, digests, strict=True)
    ]
    done = sum(_finished(trial, metric) is not None for grid in grids for trial in grid)
    num_trials, num_runs = sum(map(len, grids)), len(models) * flags.seeds
    names = dict.fromkeys(recipe.name for tried in recipes for recipe in tried)
    if distributed.is_main():
        terminal.console().print(
            f"--sweep: {num_trials} trials ({done} of them done before) on nine tenths of the "
            f"training images of {images.root}, {' + '.join(str(len(grid)) for grid in grids)} "
            f"for the models in turn, by {', '.join(names)}; then {num_runs} runs on all training "
            f"images: {num_trials - done + num_runs} runs to do",
            soft_wrap=True,
        )
    sweeps = []
    for grid, held_out in zip(grids, seen_of_each, strict=True):
        code, ended = _run_trials(grid, train, metric)
        if code:
            return code, []
        sweeps.append(Sweep(ended, metric, held_out))
    return 0, sweeps


# ------------------------------------------------------------------------------------------------


def _trials_of(
    recipes: Sequence[Run],
    flags: SweepFlags,
    named: Collection[str],
    *,
    images: Divisible,
    weights: str,
    folder: Path,
) -> list[Trial]:
    """Returns the trials of a model, ordered by recipe, then by rate, then by decay.

    Args:
        recipes: The recipes, with the one that fits the model first. Folders of the other recipes'
            trials begin with the name of the recipe.
        flags: The flags of the grid, to which each recipe's own rate and decay are added.
        named: Full names of the fields that the user set.
        images: The training images, of which a tenth is held out.
        weights: The digest of the initial weights.
        folder: The parent of the trials' folders.

    Raises: ConfigError: if a rate falls below the ends of the recipe's schedule.
    """
    from fd_large.engine.student import has_layers

    trials, inputs = [], {"images": images.fingerprint, "weights": weights}
    for place, recipe in enumerate(recipes):
        beginning = f"{recipe.name}_" if place else ""
        # Random weights have no layer decay.
        is_decayed = recipe.student.init and has_layers(
            recipe.student, image_size=recipe.data.image_size
        )
        decays = flags.sweep_decays if is_decayed else ()
        for rate in sorted({*flags.sweep_rates, 1.0}):
            for decay in sorted({*decays, recipe.optim.layer_decay}):
                where = folder / f"{beginning}rate_{rate:g}_decay_{decay:g}"
                try:
                    run = with_point(recipe, rate, decay, named)
                except ConfigError as error:
                    raise ConfigError(
                        f"--sweep_rates {rate:g}: with the recipe {recipe.name}: {error}"
                    ) from None
                run = _held_out(run, images.root, where)
                trials.append(Trial(rate, decay, RecordedRun("trial.json", "a trial", run, inputs)))
    return trials


def with_point(recipe: Run, rate: float, decay: float, named: Collection[str]) -> Run:
    """Returns a recipe with the learning rate and the layer decay of a point of the grid.

    The rates at the start and the end of the schedule keep their ratios to the peak, unless the
    user set these rates.

    Args:
        recipe: The recipe.
        rate: Multiple of the recipe's learning rate.
        decay: The layer decay.
        named: Full names of the fields that the user set.
    """
    peak = {"optim.base_lr": rate * recipe.optim.base_lr}
    ends = {n: end for n, end in recipe.optim.implied(peak).items() if n not in named}
    return override(recipe, {**peak, **ends, "optim.layer_decay": decay})


def _run_trials(
    trials: Sequence[Trial],
    train: Callable[[Run], tuple[int, dict[str, Any]]],
    metric: Metric,
) -> tuple[int, tuple[Trial, ...]]:
    """Trains the unfinished trials of a model.

    Args:
        trials: The trials of the grid.
        train: Function that trains a run, and returns the exit code and the content of its
            summary.json.
        metric: The score by which the best trial is chosen.

    Returns: the exit code, and the trials with their scores, or none if the code is not 0.
    Raises: ConfigError: if no trial has a score.
    """
    from fd_large.ranks import distributed
    from fd_large.runtime.hooks import GUARD
    from fd_large.runtime.run_folder import status_of

    ended = []
    for trial in trials:
        ended_trial, recorded = _finished(trial, metric), trial.recorded
        if ended_trial is None:
            distributed.of_main(recorded.write)
            code, summary = train(recorded.run)
            # The guard ended it; other causes of this exit code must be mended first.
            diverged = (
                code == Exit.LOOK
                and distributed.of_main(partial(status_of, recorded.folder)) == GUARD
            )
            if code and not diverged:
                return code, ()
            ended_trial = trial._replace(score=None if diverged else _finite(metric.of(summary)))
            status = "diverged" if diverged else "done"
            outcome: dict[str, Any] = {"status": status, metric.key: ended_trial.score}
            distributed.of_main(partial(recorded.write, **outcome))
        if distributed.is_main():
            shutil.rmtree(recorded.folder / CHECKPOINTS, ignore_errors=True)
        ended.append(ended_trial)
    if all(trial.score is None for trial in ended):
        runs = [trial.recorded.run for trial in ended]
        rates = sorted({run.optim.base_lr for run in runs})
        raise ConfigError(
            f"--sweep_rates: every trial of {runs[0].name} diverged or has no score; got the "
            f"learning rates {', '.join(f'{rate:g}' for rate in rates)}, expected a rate that "
            "trains. Lower --optim.base_lr."
        )
    return 0, tuple(ended)


def _finite(score: float | None) -> float | None:
    """Returns `score`, or None if it is None, NaN or infinite.

    For example, box AP is NaN on images without objects.
    """
    return score if score is not None and isfinite(score) else None


def _finished(trial: Trial, metric: Metric) -> Trial | None:
    """Returns `trial` with its recorded score, or None if the trial is not finished.

    Every rank has to call this function.

    Args:
        trial: The trial.
        metric: The score that is read from the trial's record.

    Raises: ConfigError: if the trial's folder holds a trial of another recipe or other inputs.
    """
    from fd_large.ranks import distributed

    record = distributed.of_main(trial.recorded.read)
    if "status" not in record:
        return None
    return trial._replace(score=record.get(metric.key))


def _held_out(recipe: Run, part: str, folder: Path) -> Run:
    """Returns a recipe that trains on nine tenths of the training images and tests on the rest.

    Args:
        recipe: The recipe.
        part: Root of the training images.
        folder: Folder of the run.
    """
    return replace(
        recipe,
        data=replace(recipe.data, root=part, val_fraction=HELD_OUT),
        eval=replace(recipe.eval, root=""),
        runtime=replace(recipe.runtime, run_dir=str(folder), keep_last=1, keep_every=0),
    )
