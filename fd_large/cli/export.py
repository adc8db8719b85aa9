"""The command `fd-large export RUN --to FORMAT OUT`, which writes a student for a library."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.errors import CheckpointError
from fd_large.files import check_out, json_object
from fd_large.recipes.fields import require
from fd_large.recipes.file_names import EVALUATIONS, SUMMARY
from fd_large.recipes.stored import read_recipe, recipe_file, run_of_checkpoint
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.push import REPOSITORY

log = logging.getLogger(__name__)

SHARD_SIZE = "5GB"


@dataclass(frozen=True, kw_only=True)
class Export(AllowsCode):
    """Write the student of a run's newest or named checkpoint for another library.

    OUT is a new folder with the weights, config.json, and the model card README.md.
    """

    # Folder of the run, for example runs/quickstart, or of one of its checkpoints, for example
    # runs/quickstart/checkpoints/best.
    run: Annotated[str, Positional, arg(metavar="RUN")]
    # Folder to write, which must not exist yet.
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # Library or format. timm: timm's names. hf: transformers' Swinv2, BEiT or ViT. fd: the names of
    # Feature-Distillation. onnx: an ONNX graph. program: a torch.export program. The formats onnx
    # and program run without any model code. A segmentation run can also be written with its heads,
    # as mmseg (mmsegmentation's names) or upernet (transformers' UperNetForSemanticSegmentation).
    to: To
    # Side in pixels of the exported model's images. 0: the side in the training. A model with a
    # table of positions takes no other side.
    image_size: int = 0
    # Largest size of a file of weights. The weights of a larger model are split into several files,
    # with an index.
    shard_size: str = SHARD_SIZE
    # OWNER/NAME of a new, private repository on the Hugging Face Hub to which OUT is uploaded.
    push: str = ""
    # Licence of the student, by its name on the Hub (mit, apache-2.0, ...). Empty: the model card
    # says that the licence is unknown.
    license: str = ""
    # OWNER/NAME of the teacher on the Hub, from which the student learnt. It is needed only if the
    # recipe does not name it, because the teacher was a file on a disk.
    base_model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (LIBRARIES[self.to].graph and self.shard_size != SHARD_SIZE),
            f"--shard_size: --to {self.to} has one graph and no shards",
            self.shard_size,
            "no such flag",
            "Leave out --shard_size",
        )
        require(
            bool(re.fullmatch(r"[a-z0-9.-]*", self.license)),
            "--license: not a licence's name on the Hub",
            self.license,
            "small letters, digits, dots and dashes, such as apache-2.0",
        )
        require(
            not self.base_model or bool(REPOSITORY.fullmatch(self.base_model)),
            "--base_model: not a model's name on the Hub",
            self.base_model,
            "OWNER/NAME",
        )


def main(arguments: list[str]) -> int:
    """Exports a run's student, and uploads it if requested; returns the exit code."""
    options = parse(Export, arguments, command="export")
    # torch is not imported yet.
    recipe_file(run_of_checkpoint(options.run), where="export")
    check_out(options.out, where="export")
    step, parameters, files = export(
        options.run,
        options.out,
        options.to,
        options.shard_size,
        image_size=options.image_size,
        repository=options.push,
        licence=options.license,
        base_model=options.base_model,
    )
    print(
        f"step {step}: {parameters:,} parameters in {len(files)} "
        f"file{'s' if len(files) > 1 else ''}: {options.out}"
    )
    if options.push:
        from fd_large.weights.push import push

        print(f"uploaded to a private repository: {push(Path(options.out), options.push)}")
    return 0


def export(
    run: str,
    out: str,
    to: To,
    shard_size: str = SHARD_SIZE,
    *,
    image_size: int = 0,
    repository: str = "",
    licence: str = "",
    base_model: str = "",
) -> tuple[int, int, list[Path]]:
    """Writes the student of a checkpoint to the new folder `out`.

    `Export` describes the arguments. The upload to `repository` (--push; "" for none) is left to
    the caller; here it is only checked to be possible.

    Returns: the step of the checkpoint, the student's number of parameters, and the written files.

    Raises: FDError: if the format cannot hold the student, or the upload would not be possible.
    """
    # Importing torch takes seconds.
    from fd_large.backbones.registry import parameter_shapes
    from fd_large.checkpoint import stream
    from fd_large.engine.checkpoint_models import code_hash, student_tensors
    from fd_large.evaluation.lineage import trainings_of
    from fd_large.tasks.jobs import job_of, stored_run_of
    from fd_large.weights import export as exports
    from fd_large.weights import model_card
    from fd_large.weights.graph_export import check_packages, export_graph
    from fd_large.weights.push import check_push

    folder, size = Path(run), exports.parse_size(shard_size)
    recipe = read_recipe(run_of_checkpoint(folder), where="export")
    job = job_of(recipe)
    stored, student = stored_run_of(job), job.stored_student()
    sizes = recipe.student.sizes()
    architecture = exports.resized(student.architecture, image_size)
    into = stored.exported_into(architecture, to)
    check_packages(to)
    check_out(Path(out), where="export")
    if repository:
        check_push(repository)
    trained_by = [training.to_dict() for training in trainings_of(str(folder))]
    shapes = parameter_shapes(architecture)
    parameters = sum(map(math.prod, shapes.values()))

    def write() -> tuple[int, list[Path]]:
        reader = stream.newest(folder, where="export")
        tensors = student_tensors(reader, student)
        made_by = code_hash(reader, student.architecture)
        beside = stored.exported_beside(reader, shapes, to)
        card = model_card.card(
            recipe.to_dict(),
            model_card.ExportedStudent(
                architecture=architecture,
                statistics=student.statistics,
                into=into,
                to=to,
                parameters=parameters,
                manifest=reader.manifest,
                summary=_summary(folder, reader.manifest["update"]),
                sharded=4 * parameters > size,
                repository=repository,
                licence=licence,
                base_model=base_model,
                code_hash=made_by,
                trained_by=trained_by,
            ),
            stored.learned(reader.manifest, to),
        )
        student_items = ((name, tensors[name]) for name in shapes)
        if into is None:
            files = export_graph(
                student_items,
                architecture,
                to,
                Path(out),
                sizes=sizes,
                statistics=student.statistics,
                card=card,
                code_hash=made_by,
                trained_by=trained_by,
            )
        else:
            kind = stream.outcome(reader)
            others = (
                (name, stream.read(reader, name, shape, kind=kind))
                for name, shape in beside.items()
            )
            files = exports.export(
                chain(student_items, others),
                {**shapes, **beside},
                architecture,
                into,
                Path(out),
                statistics=student.statistics,
                shard_size=size,
                card=card,
                code_hash=made_by,
                trained_by=trained_by,
                beside=lambda folder: stored.export_heads(reader, folder / exports.HEADS, size),
            )
        return reader.manifest["update"], files

    step, files = _while_pruned(folder, write)
    return step, parameters, files


def _while_pruned(folder: Path, write: Callable[[], Any]) -> Any:
    """Returns the result of `write`, which reads a checkpoint of a run and exports it.

    A run that still trains may remove the checkpoint that `write` reads. Then `write` is called
    again, and reads the newest checkpoint.

    Raises: CheckpointError: if writing fails while the run's checkpoints stay the same.
    """
    from fd_large.checkpoint import store

    while True:
        before = store.renamed(folder)
        try:
            return write()
        except CheckpointError as error:
            if store.renamed(folder) == before:
                raise
            log.warning("export: %s The newest checkpoint is exported instead.", error)


def _summary(folder: Path, step: int) -> dict[str, Any]:
    """Returns the content of a run's summary.json, adapted to its exported checkpoint.

    If `folder` is that of an earlier checkpoint, the final metrics are replaced by those of its own
    evaluation at step `step`, or by None if there was none.
    """
    from fd_large.runtime.run_folder import rows_before

    run = run_of_checkpoint(folder)
    summary = json_object(run / SUMMARY)
    if run == folder or summary.get("updates") == step:
        return summary
    rows = rows_before(run / EVALUATIONS, step + 1)
    evaluation = next((row for row in rows if row["update"] == step), {})
    measured = {name for row in rows for name in row} - {"update"}
    return summary | dict.fromkeys([*measured, "loss_end"]) | evaluation | {"updates": step}
