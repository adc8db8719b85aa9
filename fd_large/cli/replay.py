"""`python -m fd_large replay FILE`."""

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
    from rich.text import Text

    from fd_large.engine.replay import Incident, Replayed, Weights


@dataclass(frozen=True, kw_only=True)
class Replay(AllowsCode):
    """Run a step that the guard refused again, on one device."""

    # RUN/incidents/update_NNNNNNNN, or the incident.json in it.
    file: Annotated[str, Positional, arg(metavar="FILE")]


def main(arguments: list[str]) -> int:
    """Runs the step and prints what differs from what was recorded."""
    given = parse(Replay, arguments, command="replay")
    require_paths({"replay": given.file})
    # Importing torch and deepspeed takes seconds.
    from fd_large.engine.replay import find_weights, read_incident, run_again
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import job_of

    full_float32(distributed.device())
    incident = read_incident(Path(given.file), job_of)
    weights = find_weights(incident)
    console = tables()
    _print_incident(console, incident, weights, str(distributed.device()))
    replayed = run_again(incident, weights)
    _print_losses(console, incident, replayed)
    _print_layers(console, incident, replayed)
    if replayed.other_training:
        console.print(f"NOT THE TRAINING of the run: {replayed.other_training}", style="red")
    return 0


def _print_incident(console: Console, incident: Incident, weights: Weights, device: str) -> None:
    said, step = incident.said, incident.said["index"]
    console.print(
        f"step {step + 1} of {incident.folder}", style="bold", markup=False, soft_wrap=True
    )
    for off in said["off"]:
        usual = "" if off["median"] is None else f", median before it {off['median']:.6g}"
        limit = "" if off["limit"] is None else f", limit {off['limit']:.6g}"
        console.print(f"  {off['what']} {off['value']:.6g}{usual}{limit}")
    console.print(f"  {incident.job.run.engine.precision} on {device}")
    if weights.accepted_between is None:
        console.print(
            f"  weights: checkpoint of {weights.update} steps, {weights.update - step} LATER "
            "than the step (older ones are gone): losses will differ",
            style="yellow",
        )
    elif weights.accepted_between:
        console.print(
            f"  weights: checkpoint of {weights.update} steps, {weights.accepted_between} earlier "
            "than the step: losses will differ",
            style="yellow",
        )
    else:
        console.print(f"  weights: checkpoint of {weights.update} steps, those of the step")


def _print_losses(console: Console, incident: Incident, replayed: Replayed) -> None:
    from rich.table import Table
    from rich.text import Text

    said = incident.said
    table = Table(title="Losses", title_justify="left")
    for column in ("rank", "micro batch", "recorded", "now"):
        table.add_column(column, justify="right")
    table.add_column("images", overflow="fold")
    size = said["micro_batch_size"]
    for own in incident.images:
        names = said["ranks"][own.rank]["names"]
        for number, (before, now) in enumerate(
            zip(own.losses, replayed.losses[own.rank], strict=True)
        ):
            table.add_row(
                str(own.rank),
                str(number),
                _number(before),
                _number(now),
                Text("\n".join(names[number * size : (number + 1) * size])),
            )
    console.print(table)
    whole = len(incident.images) == said["world_size"]
    console.print(
        Text("gradient norm: ").append_text(_number(replayed.grad_norm)),
        Text("of the images above; recorded")
        if whole
        else Text("of the images above; recorded, of all ranks,"),
        _number(said["grad_norm"]),
    )


def _print_layers(console: Console, incident: Incident, replayed: Replayed) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Largest magnitude at each layer's output", title_justify="left")
    table.add_column("layer, in execution order", overflow="fold")
    for column in ("recorded, all ranks", "forward now", "gradient now"):
        table.add_column(column, justify="right")
    for name, value in replayed.forward.items():
        table.add_row(
            Text(name),
            _number(incident.said["layers"].get(name)),
            _number(value),
            _number(replayed.gradient.get(name)),
        )
    console.print(table)
    # Last, where a terminal stands when a long table has passed.
    for what, maxima, order in (
        ("forward", replayed.forward, list(replayed.forward)),
        ("gradient", replayed.gradient, list(replayed.forward)[::-1]),
    ):
        bad = [n for n in order if n in maxima and not math.isfinite(maxima[n])]
        text = f"{bad[0]} is the first layer that is not finite" if bad else "finite at every layer"
        console.print(Text(f"{what}: {text}", style="bold red" if bad else ""))


def _number(value: float | None) -> Text:
    from rich.text import Text

    if value is None:
        return Text("")
    if math.isfinite(value):
        return Text(f"{value:.6g}")
    return Text(f"{value:g} !", style="bold red")
