"""`python -m fd_large export RUN --to timm|hf|fd OUT`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.errors import CheckpointError, ConfigError
from fd_large.recipes.stored import read_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export(AllowsCode):
    """Write the student of a run's newest checkpoint where timm or Hugging Face load it.

    OUT is a new folder: safetensors, config.json, and README.md, the model card.
    """

    # Folder of the run, for example runs/quickstart.
    run: Annotated[str, Positional, arg(metavar="RUN")]
    # Folder to write; nothing may stand there.
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # timm; hf: transformers' Swinv2, BEiT or ViT; fd: Feature-Distillation's names.
    to: Literal["timm", "hf", "fd"]
    # Size of a file at most; what is larger goes into several files with an index.
    shard_size: str = "5GB"


def main(arguments: list[str]) -> int:
    """Exports and prints what was written."""
    given = parse(Export, arguments, command="export")
    step, parameters, files = export(given.run, given.out, given.to, given.shard_size)
    print(
        f"step {step}: {parameters:,} parameters in {len(files)} "
        f"file{'s' if len(files) > 1 else ''}: {given.out}"
    )
    return 0


def export(run: str, out: str, to: str, shard_size: str = "5GB") -> tuple[int, int, list[Path]]:
    """Writes the student of a run's newest checkpoint to a new folder.

    Args:
        run: Folder of the run.
        out: Folder to write.
        to: timm, hf or fd.
        shard_size: Size of a file at most, such as 5GB.

    Returns: The step of the checkpoint, the number of parameters, and the files.
    Raises: FDError: if the run has no distilled student, or the format cannot hold it.
    """
    # torch: seconds.
    from fd_large.backbones.registry import parameter_shapes
    from fd_large.checkpoint import stream
    from fd_large.tasks.jobs import job_of
    from fd_large.weights import export as exports
    from fd_large.weights.model_card import card

    folder, size = Path(run), exports.parse_size(shard_size)
    recipe = read_recipe(folder, where="export")
    if not recipe.has_teacher:
        raise ConfigError(
            f"export: {run}: no distilled student; got a run of the task {recipe.task.name}, "
            "expected a distillation. Its model serves other runs as it is: --student.init RUN."
        )
    student = job_of(recipe).stored_student()
    architecture = student.architecture
    into = exports.export_of(architecture, to, pads=recipe.student.size_rule == "pad")
    table = parameter_shapes(architecture)
    parameters = sum(map(math.prod, table.values()))

    def write() -> tuple[int, list[Path]]:
        reader = stream.newest(folder, where="export")
        stored = {f"{stream.STUDENT}{name}": shape for name, shape in table.items()}
        sizes = reader.layout.sizes
        width = sizes.get(f"{stream.PROJECTION}bias", 0)
        projection = {
            f"{stream.PROJECTION}weight": (
                width,
                sizes.get(f"{stream.PROJECTION}weight", 0) // max(width, 1),
            ),
            f"{stream.PROJECTION}bias": (width,),
        }
        # The whole task is checked, whatever part of it goes out; but a head of the user's own
        # is trained and discarded.
        if recipe.objective.head == "linear":
            stream.check(reader, stored | projection)
        elif to == "fd":
            raise ConfigError(
                f"export: --to fd: holds a linear projection; got {recipe.objective.head}, "
                "expected objective.head linear. Take --to timm or hf."
            )
        else:
            stream.check(reader, table, prefix=stream.STUDENT)
        if to == "fd":
            stored |= projection
        items = (
            (
                name.removeprefix(stream.STUDENT),
                stream.read(reader, name, shape, kind=stream.outcome(reader)),
            )
            for name, shape in stored.items()
        )
        text = card(
            recipe.to_dict(),
            architecture,
            into,
            to,
            parameters=parameters,
            manifest=reader.manifest,
            summary=_json(folder / "summary.json"),
            statistics=student.statistics,
            sharded=4 * parameters > size,
        )
        files = exports.export(
            items,
            {name.removeprefix(stream.STUDENT): shape for name, shape in stored.items()},
            architecture,
            into,
            Path(out),
            statistics=student.statistics,
            shard_size=size,
            card=text,
        )
        return reader.manifest["update"], files

    step, files = _while_pruned(folder, write)
    return step, parameters, files


def _while_pruned(folder: Path, write: Callable[[], Any]) -> Any:
    """Writes; again if a run that trains has pruned the checkpoint under it: it has a newer one."""
    from fd_large.checkpoint import store

    while True:
        before = store.renamed(folder)
        try:
            return write()
        except CheckpointError as error:
            if store.renamed(folder) == before:
                raise
            log.warning("export: %s The newest is taken.", error)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
