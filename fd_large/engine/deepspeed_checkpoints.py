"""Exports a run's checkpoint in DeepSpeed's format, for other tools, and imports such a checkpoint.

Export and import build the run as training does, and let DeepSpeed (0.19.8) write or read the
files. Unlike the run's own checkpoints, DeepSpeed's files can be read only by as many ranks as
wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch

from fd_large.checkpoint.lease import Lease
from fd_large.engine.job import JobOf
from fd_large.engine.opening import open_stored
from fd_large.engine.zero import private_names
from fd_large.errors import CheckpointError, first_line

# torch.load refuses to work where both are set.
_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# What DeepSpeed's files hold beside tensors and plain values.
_IN_CHECKPOINTS = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
)

UPDATES, STEPS = "fd_updates", "fd_optimizer_steps"
"""Keys of DeepSpeed's client state: number of finished steps, number of steps not skipped."""


def export_checkpoint(run_dir: str, out: str, job_of: JobOf, *, deepspeed_config: str) -> int:
    """Writes a run's newest checkpoint in DeepSpeed's format into the folder `out`.

    The present number of ranks, and the stage of the DeepSpeed JSON, decide its files. Returns the
    checkpoint's step.

    Raises: CheckpointError: if the run has no checkpoint.
    """
    opened = open_stored(run_dir, job_of, deepspeed_config=deepspeed_config, where="checkpoint")
    step = opened.checkpoints.resume()
    if not step:
        raise CheckpointError(
            f"checkpoint export: {run_dir}: no checkpoint yet; got no complete checkpoint, "
            "expected at least one. Train the run first."
        )
    client_state = {UPDATES: step, STEPS: opened.checkpoints.optimizer_steps}
    opened.engine.deepspeed.save_checkpoint(out, tag=f"update_{step}", client_state=client_state)
    return step


@contextmanager
def _without_code() -> Iterator[None]:
    """Makes every torch.load in the block, also DeepSpeed's, refuse files that would run code."""
    allowed_classes = [private_names.get(path) for path in _IN_CHECKPOINTS]
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals(allowed_classes):
            yield
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _culprit(error: UnpicklingError) -> str:
    """Returns the class that torch.load refused to load, from the message of `error`."""
    return str(error).partition("GLOBAL ")[2].partition(" ")[0] or "an object of another kind"


def import_checkpoint(
    source: str, run_dir: str, job_of: JobOf, *, deepspeed_config: str, lease: Lease
) -> int:
    """Reads a DeepSpeed checkpoint of a run's model, and stores it as the run's newest checkpoint.

    Args:
        source: The folder that DeepSpeed's `save_checkpoint` wrote, with the file `latest`.
        run_dir: A folder with the run's recipe.json.
        job_of: Makes the job of that recipe.
        deepspeed_config: Path of the DeepSpeed JSON that the source was trained with. Its ZeRO
            stage and the number of ranks must be those of the source.
        lease: The right to write the run's folder.

    Returns: the checkpoint's step.

    Raises:
        CheckpointError: If DeepSpeed cannot read the source, if reading would run code from its
            files, or if the run's checkpoint cannot be written.
    """
    opened = open_stored(
        run_dir, job_of, deepspeed_config=deepspeed_config, where="checkpoint", lease=lease
    )
    engine = opened.engine.deepspeed
    try:
        with _without_code():
            path, client_state = engine.load_checkpoint(source)
    except UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint import: {source}: contains objects that need code in the files to be run;"
            f" got {_culprit(error)}, expected tensors, settings and DeepSpeed's own "
            "records. Import a checkpoint whose client_state has plain values only."
        ) from error
    except Exception as error:  # DeepSpeed raises many kinds; all mean the same to the user.
        raise CheckpointError(
            f"checkpoint import: {source}: DeepSpeed cannot read this checkpoint; got "
            f"{first_line(error)}, expected a checkpoint of this recipe, stage and number of "
            "ranks. Start as many ranks as wrote the checkpoint."
        ) from error
    if path is None:
        raise CheckpointError(
            f"checkpoint import: {source}: DeepSpeed read nothing; got no files for this engine, "
            "expected files of this stage and number of ranks. Check --deepspeed_config."
        )
    step = client_state.get(UPDATES, engine.global_steps)
    opened.checkpoints.optimizer_steps = client_state.get(STEPS, step - engine.skipped_steps)
    opened.checkpoints.save(step)
    if not opened.checkpoints.settle():
        raise CheckpointError(
            f"checkpoint import: {run_dir}: the checkpoint was not written; got a failed save, as "
            "the log says, expected finite numbers and room on the disk. Import an older "
            "checkpoint, or make room and start the same command again."
        )
    return step
