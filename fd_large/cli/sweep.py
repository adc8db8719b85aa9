"""`evaluate --sweep`: learning rates and layer decays, tried on a part of the training images.

A small change of the learning rate moves fine-tuning by more than models differ, and the rate that
suits one model does not suit another. So the same grid is tried for every model: a trial trains on
nine tenths of the training images and is tested on the rest, held out by a hash of the names of the
files (data/val_fraction.py). The best of the grid then trains on all training images, with every
seed, and only these runs see the test images.

Each trial is a run of its own below OUT/sweep. One that is finished leaves its accuracy and not its
checkpoints, so the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.atomic_files import write_json
from fd_large.errors import ConfigError, DataError
from fd_large.recipes.fields import require
from fd_large.recipes.run import Run

HELD_OUT = 0.1
"""Fraction of the training images on which trials are tested."""
_RECORD = "trial.json"


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """Flags of `evaluate` that say which recipes are tried before a model is trained."""

    # Try learning rates and layer decays for every model, on a tenth of the training images that is
    # held out, and train the best of them on all training images.
    sweep: bool = False
    # Learning rates of the sweep, as multiples of the peak learning rate of each model's recipe.
    sweep_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    # Layer decays of the sweep (optim.layer_decay).
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
            "--sweep: left out, but its grid is given",
            f"{self.sweep_rates} and {self.sweep_decays}",
            "--sweep beside them",
        )


class Trained(NamedTuple):
    """How a training ended.

    Attributes:
        code: The exit code; the rest counts where it is 0.
        accuracy: On what the run was tested on, in per cent.
        details: More about it.
    """

    code: int
    accuracy: float = 0.0
    details: Mapping[str, Any] = {}


class Trial(NamedTuple):
    """A point of the grid.

    Attributes:
        rate: Multiple of the learning rate of the model's recipe.
        decay: The layer decay.
        run: The recipe of the trial.
        accuracy: On the held-out images, in per cent.
    """

    rate: float
    decay: float
    run: Run
    accuracy: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What came out for one model.

    Attributes:
        trials: The grid; rates and decays rise.
    """

    trials: tuple[Trial, ...]

    @property
    def winner(self) -> Trial:
        """The best trial; of equal ones that with the smaller rate, then the smaller decay."""
        return max(self.trials, key=lambda trial: trial.accuracy)

    def at_edge(self) -> list[str]:
        """Returns the names of what a wider grid might find better values of."""
        rates = {trial.rate for trial in self.trials}
        decays = {trial.decay for trial in self.trials}
        rate, decay, *_ = self.winner
        found = {
            "rate": len(rates) > 1 and rate in (min(rates), max(rates)),
            # A decay above 1 means nothing.
            "decay": len(decays) > 1 and decay in {min(decays), max(decays)} - {1.0},
        }
        return [name for name, is_edge in found.items() if is_edge]

    def as_json(self) -> dict[str, Any]:
        """Returns the winner and the grid, for summary.json."""
        return {
            **_as_json(self.winner),
            "at_edge": self.at_edge(),
            "trials": [_as_json(trial) for trial in self.trials],
        }


def check_fields(changes: Mapping[str, Any]) -> None:
    """Refuses fields of a recipe that a sweep decides.

    Raises: ConfigError: if one is given.
    """
    mistakes = {
        "optim.layer_decay": "the sweep decides it; got a value of your own, expected none. Set "
        "--sweep_decays.",
        "data.val_fraction": "the sweep holds out a part of train/ by itself; got a folder without "
        "train/, expected train/ beside val/ or test/. Move the images into such folders.",
        "runtime.run_dir": "one folder for several runs; got a sweep, expected one run. Set --out, "
        "in which each has a folder.",
    }
    found = [f"--{name}: {what}" for name, what in mistakes.items() if changes.get(name)]
    if found:
        raise ConfigError("\n".join(found))


def divisible_part(root: str) -> str:
    """Returns the folder of the training images, a part of which can be held out.

    Args:
        root: The dataset (data.root).

    Raises: DataError: if they are no folder's, or too few.
    """
    from fd_large.data.folder import ImageFolder
    from fd_large.data.labelled import open_split

    images = open_split(root, "train").images
    if not isinstance(images, ImageFolder):
        raise DataError(
            "--sweep: only a folder of images is divided by the names of its files; got "
            f"{type(images).__name__} for data.root, expected train/ with a folder for each "
            "class. Leave --sweep out, and name rates by --optim.base_lr."
        )
    open_split(images.root, "train", val_fraction=HELD_OUT)
    return images.root


def trials_of(recipe: Run, flags: SweepFlags, *, part: str, folder: Path) -> list[Trial]:
    """Returns the trials of one model, in the order of rates, then of decays.

    Args:
        recipe: The recipe that the model would be trained by without a sweep.
        flags: The grid.
        part: The folder of the training images, of which a tenth is held out.
        folder: The folder of the trials' folders.

    Raises: ConfigError: if a rate falls below those at the ends of the recipe's schedule.
    """
    trials = []
    for rate in sorted(set(flags.sweep_rates)):
        for decay in sorted(set(flags.sweep_decays)):
            where = folder / f"rate_{rate:g}_decay_{decay:g}"
            try:
                run = with_point(recipe, rate, decay)
            except ConfigError as error:
                raise ConfigError(f"--sweep_rates {rate:g}: of {recipe.name}, {error}") from None
            trials.append(Trial(rate, decay, _held_out(run, part, where)))
    return trials


def with_point(recipe: Run, rate: float, decay: float) -> Run:
    """Returns a recipe at a point of the grid."""
    optim = replace(recipe.optim, base_lr=rate * recipe.optim.base_lr, layer_decay=decay)
    return replace(recipe, optim=optim)


def run_trials(trials: Sequence[Trial], train: Callable[[Run], Trained]) -> tuple[int, Sweep]:
    """Trains the trials that are not finished; returns the exit code, and what came out.

    Args:
        trials: The grid.
        train: Trains a run.
    """
    from fd_large import distributed

    done = []
    for trial in trials:
        where = Path(trial.run.run_dir())
        accuracy = finished(trial)
        if accuracy is None:
            code, accuracy, _ = train(trial.run)
            if code:
                return code, Sweep(())
            if distributed.is_main():
                write_json(
                    where / _RECORD, {"recipe": trial.run.to_dict(), "held_out_accuracy": accuracy}
                )
        if distributed.is_main():
            shutil.rmtree(where / "checkpoints", ignore_errors=True)
        done.append(trial._replace(accuracy=accuracy))
    return 0, Sweep(tuple(done))


def finished(trial: Trial) -> float | None:
    """Returns the accuracy of a trial that an earlier start finished; None: it is not finished.

    A collective.

    Raises: ConfigError: if its folder holds a trial of another recipe.
    """
    from fd_large import distributed

    file = Path(trial.run.run_dir()) / _RECORD

    def read() -> float | None:
        if not (distributed.is_main() and file.is_file()):
            return None
        record = json.loads(file.read_text())
        if found := trial.run.changes_since(record["recipe"]):
            changed = "; ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in found.items())
            raise ConfigError(
                f"{file.parent}: holds a trial of another recipe; got {changed}, expected the "
                "same. Set --out to another folder."
            )
        return float(record["held_out_accuracy"])

    return distributed.broadcast_object(distributed.together(read))


# ------------------------------------------------------------------------------------------------


def _held_out(recipe: Run, part: str, folder: Path) -> Run:
    """A recipe that learns nine tenths of the training images and is tested on the rest."""
    return replace(
        recipe,
        data=replace(recipe.data, root=part, val_fraction=HELD_OUT),
        eval=replace(recipe.eval, root=""),
        runtime=replace(recipe.runtime, run_dir=str(folder), keep_last=1, keep_every=0),
    )


def _as_json(trial: Trial) -> dict[str, Any]:
    optim = trial.run.optim
    return {
        "rate": trial.rate,
        "base_lr": optim.base_lr,
        "layer_decay": optim.layer_decay,
        "held_out_accuracy": trial.accuracy,
        "run": trial.run.run_dir(),
    }
