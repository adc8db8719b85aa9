"""Makes the trackers of a recipe, and calls them so that their errors do not end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fd_large import doors
from fd_large.errors import ConfigError, FDError, first_line
from fd_large.runtime.hooks import Tracker
from fd_large.runtime.logs import FILE_ONLY
from fd_large.runtime.mlflow import MLflow
from fd_large.runtime.tensorboard import TensorBoard
from fd_large.runtime.wandb import WandB

WHERE = "runtime.trackers"

TRACKERS: dict[str, Callable[[], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
"""The built-in trackers. To add a tracker, write a class in a file of this folder and add a line to
this table, or write a class in a file of the user's own."""

log = logging.getLogger(__name__)


def trackers_of(names: Sequence[str]) -> list[Tracker]:
    """Makes the trackers of a recipe, which open no file or connection before `on_start`.

    Args:
        names: Names of built-in trackers, or of the user's own trackers:
            module:PATH/TO/FILE.py:NAME, module:package.module:NAME, or the name of an installed
            plugin.

    Raises: ConfigError: if there is no tracker of a name, or its class fails or is no `Tracker`.
    """
    trackers = []
    for name in names:
        make = doors.load(name, kind="trackers", where=WHERE, built_in=TRACKERS)
        try:
            tracker = make()
        except FDError:
            raise
        except Exception as error:  # The user's code may raise anything.
            raise ConfigError(
                f"{WHERE}: {name} cannot be made; got {doors.cause(error)}, expected a Tracker "
                "from a call without arguments. Correct the class."
            ) from error
        if not isinstance(tracker, Tracker):
            raise ConfigError(
                f"{WHERE}: {name} is not a tracker; got {type(tracker).__name__}, expected a "
                "subclass of fd_large.runtime.hooks.Tracker. Correct the class."
            )
        trackers.append(tracker)
    return trackers


class Trackers:
    """Calls several trackers in order, and no longer calls a tracker that raised an error.

    Args:
        trackers: The trackers.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def tell(self, method: str, *arguments: Any) -> None:
        """Calls the method `method` of each tracker with `arguments`.

        If the call raises an error, the error is logged, and the tracker is called no more.

        Args:
            method: Name of a method of `Tracker`.
            arguments: Arguments of the method.
        """
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # Numbers that are not shown are no reason to stop training.
                log.warning(
                    "tracker %s FAILED in %s and is not used any more: %s",
                    type(tracker).__name__,
                    method,
                    first_line(error),
                )
                log.info("its error:", exc_info=True, extra=FILE_ONLY)
                self._trackers.remove(tracker)
