"""The command `fd-large replay FILE`, which repeats a training step that the guard refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.cli.output import tables
from fd_large.cli.paths import require_paths

if TYPE_CHECKING:
    from rich.console import Console

    from fd_large.engine.replay import Replayed


@dataclass(frozen=True, kw_only=True)
class Replay(AllowsCode):
    """Repeat, on one device, a step that the guard refused."""

    # Record of the step: the folder RUN/incidents/update_NNNNNNNN, or the incident.json in that
    # folder.
    file: Annotated[str, Positional, arg(metavar="FILE")]


def main(arguments: list[str]) -> int:
    """Repeats a recorded step that the guard refused; returns the exit code.

    It prints the step's losses and gradient norm beside the recorded values.
    """
    options = parse(Replay, arguments, command="replay")
    require_paths({"replay": options.file})
    # Importing torch and deepspeed takes seconds.
    from fd_large.engine.replay import replay
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import job_of

    full_float32(distributed.device())
    replayed = replay(Path(options.file), job_of)
    console = tables()
    _print_step(console, replayed, str(distributed.device()))
    _print_losses(console, replayed)
    if replayed.other_training:
        console.print(f"ANOTHER TRAINING than the run's: {replayed.other_training}", style="red")
    return 0


def _print_step(console: Console, replayed: Replayed, device: str) -> None:
    incident, weights = replayed.incident, replayed.checkpoint
    step = incident["index"]
    console.print(
        f"step {step + 1} of {replayed.folder}", style="bold", markup=False, soft_wrap=True
    )
    for off in incident["off"]:
        usual = "" if off["median"] is None else f", median before it {off['median']:.6g}"
        limit = "" if off["limit"] is None else f", limit {off['limit']:.6g}"
        console.print(f"  {off['what']} {off['value']:.6g}{usual}{limit}")
    console.print(f"  {replayed.precision} on {device}")
    text = f"  weights: checkpoint of {weights} steps, "
    if weights == step:
        console.print(f"{text}the state before this step")
    elif weights < step:
        before = "1 step" if weights == step - 1 else f"{step - weights} steps"
        text += f"{before} before this step: losses will differ"
        console.print(f"{text}, unless the steps between were refused too", style="yellow")
    else:
        text += f"{weights - step} steps AFTER this step (older ones are gone): losses will differ"
        console.print(text, style="yellow")


def _print_losses(console: Console, replayed: Replayed) -> None:
    for batch, loss in zip(replayed.micro_batches, replayed.losses, strict=True):
        numbers = f"loss {_number(batch.recorded)} recorded, {_number(loss)} now"
        text = f"  rank {batch.rank}: {numbers}; {', '.join(batch.names)}"
        console.print(text, markup=False, soft_wrap=True)
    ranks = {batch.rank for batch in replayed.micro_batches}
    scope = "" if len(ranks) == replayed.incident["world_size"] else " of the images above"
    recorded, now = _number(replayed.incident["grad_norm"]), _number(replayed.grad_norm)
    console.print(f"  gradient norm {recorded} recorded, {now} now{scope}")


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else f"{value:g} !"
