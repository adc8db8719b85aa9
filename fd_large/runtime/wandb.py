"""Tracker that sends curves to Weights & Biases (W&B)."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

from fd_large.errors import masked
from fd_large.runtime.curves import RemoteCurves, run_name
from fd_large.runtime.hooks import DONE, PREEMPTED, Setting


class WandB(RemoteCurves):
    """Tracker with a run in Weights & Biases (W&B).

    The run is in the project that the environment variable WANDB_PROJECT names; without the
    variable, in the project `fd_large`. With WANDB_MODE=offline, W&B's run is kept in RUN/wandb,
    and can be sent later by `wandb sync`.
    """

    name, package = "wandb", "wandb"

    def begin(self, setting: Setting, recipe: dict[str, Any], known: str | None) -> None:
        """Opens the run in W&B, with the recipe as its configuration.

        Args:
            setting: The facts of this run.
            recipe: Contents of recipe.json, without secrets.
            known: ID of the run in W&B to continue, or None for a new run.
        """
        import wandb

        # Evaluations whose step the training rows have not reached: wandb takes steps in order.
        self._early: dict[int, dict[str, float]] = {}
        self._step = setting.first_update
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise PermissionError(
                "no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
            )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fd_large",
            id=known or secrets.token_hex(4),
            resume="allow",
            # Several students have a run each in one process.
            reinit="create_new",
            name=run_name(setting, recipe),
            tags=list(recipe["runtime"].get("tags", ())),
            config=recipe,
            dir=str(setting.folder),
            settings=wandb.Settings(
                console="off",
                silent=True,
                # W&B would store the command, in this case with the secrets in it.
                x_disable_meta=masked(sys.argv) != sys.argv,
            ),
        )
        self.keep(setting, self._run.id)

    def send(self, values: dict[str, float], step: int) -> None:
        """Sends one point for each curve that `values` names, in the order of steps.

        An evaluation at a later step than the newest training row is kept, and sent with the
        training row of the same step. An evaluation at an earlier step than the newest training row
        is sent at the step of this row, and the step of the evaluation as evaluation/of_step. After
        a resume, W&B drops points of steps that W&B's run already has.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        if "train/loss" not in values and step > self._step:
            self._early.setdefault(step, {}).update(values)
            return
        if step < self._step:
            # An evaluation was scored while training went on; W&B takes steps in order only.
            values, step = {**values, "evaluation/of_step": step}, self._step
        self._run.log({**values, **self._early.pop(step, {})}, step=step)
        self._step = max(self._step, step)

    def finish(self, status: str) -> None:
        """Sends the kept evaluations, and closes the run in W&B.

        Args:
            status: How this run ended; W&B shows the run as failed unless it is "done" or
                "preempted".
        """
        for step, values in sorted(self._early.items()):
            self._run.log(values, step=step)
        self._run.finish(exit_code=0 if status in (DONE, PREEMPTED) else 1)
