"""`python -m fd_large export RUN --to timm|hf|fd OUT`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.errors import CheckpointError
from fd_large.recipes.stored import read_recipe
from fd_large.weights.libraries import To

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
    to: To
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


def export(run: str, out: str, to: To, shard_size: str = "5GB") -> tuple[int, int, list[Path]]:
    """Writes the student of a run's newest checkpoint to a new folder.

    Args:
        run: Folder of the run.
        out: Folder to write.
        to: timm, hf or fd.
        shard_size: Size of a file at most, such as 5GB.

    Returns: The step of the checkpoint, the number of parameters, and the files.
    Raises: FDError: if the run's task exports no student, or the format cannot hold it.
    """
    # torch: seconds.
    from fd_large.backbones.registry import parameter_shapes
    from fd_large.checkpoint import stream
    from fd_large.engine.job import ExportedStudent
    from fd_large.tasks.jobs import job_of
    from fd_large.weights import export as exports

    folder, size = Path(run), exports.parse_size(shard_size)
    recipe = read_recipe(folder, where="export")
    job = job_of(recipe)
    job.check_export(to)
    student = job.stored_student()
    architecture = student.architecture
    into = exports.export_of(architecture, to, pads=recipe.student.size_rule == "pad")
    table = parameter_shapes(architecture)
    parameters = sum(map(math.prod, table.values()))

    def write() -> tuple[int, list[Path]]:
        reader = stream.newest(folder, where="export")
        stored = {f"{stream.STUDENT}{name}": shape for name, shape in table.items()}
        stored |= job.exported_beside(reader, table, to)
        items = (
            (
                name.removeprefix(stream.STUDENT),
                stream.read(reader, name, shape, kind=stream.outcome(reader)),
            )
            for name, shape in stored.items()
        )
        exported = ExportedStudent(
            student,
            into,
            to,
            parameters=parameters,
            manifest=reader.manifest,
            summary=_json(folder / "summary.json"),
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
            card=job.model_card(exported),
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
