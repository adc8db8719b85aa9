"""The package's Python API: distil, load and evaluate inside the caller's process.

`import fd_large` provides the public names of this module. Its functions build the same recipes
and call the same functions as the command line, on one device. A mistake raises an FDError with
the sentence that the command line prints. A finished call leaves no process group, signal handler,
log handler, thread or changed setting of torch in the caller's process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large import doors
from fd_large.checkpoint import store
from fd_large.engine.guest import cuda_devices, guest
from fd_large.errors import ConfigError, nearest
from fd_large.files import kind_of, read_json
from fd_large.recipes import registry
from fd_large.recipes.fields import flat_plain, from_plain, hints_of
from fd_large.recipes.file_names import SUMMARY
from fd_large.recipes.run import Run, difference
from fd_large.recipes.run_file import Given, accepted, named_fields, run_of
from fd_large.recipes.stored import with_stored_ends

if TYPE_CHECKING:
    from fd_large.engine.trained_model import TrainedModel
    from fd_large.weights.libraries import To

log = logging.getLogger(__name__)

Value = str | os.PathLike[str] | Mapping[str, Any]
"""The value of a section's main field, or several fields of the section by name."""


@dataclass(frozen=True)
class Result:
    """Result of a run; a notebook shows it as a table with the run's curves.

    Attributes:
        folder: The run's folder, which all commands accept.
        status: How the run ended: `done`, or `preempted` after a Ctrl-C. The same call resumes a
            preempted run.
        summary: Content of summary.json.
    """

    folder: Path
    status: str
    summary: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """Newest value of each metric by its name in evaluations.jsonl, or {} before any."""
        return {name: values[-1] for name, values in self._evaluated.items()}

    @property
    def history(self) -> dict[str, list[float]]:
        """Values of each metric by the metric's name, from the first evaluation to the last.

        The list `update` holds the number of finished steps at each evaluation. A metric that some
        evaluations do not measure has a shorter list.
        """
        steps = [row["update"] for row in self._files.evaluations]
        return {"update": steps, **self._evaluated}

    @property
    def best(self) -> Path | None:
        """Folder of the checkpoint with the best value of the metric `eval.best_metric`.

        The value is None if the run keeps no such checkpoint.
        """
        return store.best_of(self.folder)

    @cached_property
    def model(self) -> TrainedModel:
        """The trained student, loaded with `load_student`."""
        return load_student(self.folder)

    def export(self, out: str | os.PathLike[str], *, to: To = "timm") -> Path:
        """Exports the student for other libraries, as `fd-large export` does; returns the folder.

        Args:
            out: Folder to write, which must not exist.
            to: timm, hf, fd, mmseg, upernet, onnx or program.
        """
        from fd_large.cli.export import export

        export(str(self.folder), os.fspath(out), to)
        return Path(out)

    @property
    def _files(self) -> Any:
        from fd_large.report.run_files import read_run

        return read_run(self.folder)

    @property
    def _evaluated(self) -> dict[str, list[float]]:
        files = self._files
        return {name: files.evaluated(name)[1].tolist() for name in files.measured}

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        steps = f"{self.summary.get('updates')} of {self.summary.get('total_updates')} steps"
        return f"Result({self.status}, {steps}, {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        from fd_large.report.notebook import run_html

        return run_html(self._files)


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; a notebook shows it as a table with a plot.

    Attributes:
        folder: The folder of the results.
        summary: Content of summary.json; empty if the task does not write this file.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def accuracy(self) -> dict[str, float]:
        """Each model's accuracy in per cent, averaged over the seeds, by the model's label.

        The result is {} if the task does not write summary.json.
        """
        return {model["label"]: model["mean"] for model in self.summary.get("nets", ())}

    def __repr__(self) -> str:
        return f"Evaluation({self.accuracy}, {str(self.folder)!r})"

    def _repr_html_(self) -> str:
        from fd_large.report.notebook import evaluation_html

        return evaluation_html(self.summary, self.folder)


def recipe(name: str, **fields: Any) -> Run:
    """Returns a named recipe with some of its fields changed.

    Args:
        name: One of `fd_large.RECIPES`.
        **fields: The changed fields: a section with a dict, optim={"max_steps": 20}, or full
            names, **{"optim.max_steps": 20}.

    Raises: FDError: with one line for each mistake.
    """
    return _run_of(name, _texts(fields))


def distill(
    *,
    out: str | os.PathLike[str],
    data: Value = "",
    teacher: Value = "",
    student: Value = "",
    recipe: str | Run = registry.DEFAULT_RECIPE,
    deepspeed_config: str = "zero1",
    fresh: bool = False,
    **fields: Any,
) -> Result:
    """Distils a teacher into a student on this machine's first GPU, or on the CPU without a GPU.

    The same call resumes an interrupted run, and does nothing for a finished run.

        fd_large.distill(
            data="photos/", teacher="timm:vit_small_patch16_224", student="swinv2_tiny",
            out="runs/first", optim={"max_steps": 500},
        )

    Args:
        out: The run's folder (runtime.run_dir).
        data: Training images (data.root), or several fields of the section: {"root": ...}.
        teacher: The teacher's weights (teacher.source), or several fields of the section.
        student: Name of the student's model (student.model), or several fields of the section.
        recipe: Name of the base recipe, or a `Run`.
        deepspeed_config: DeepSpeed's JSON, a name or a path.
        fresh: Starts again although the folder has checkpoints.
        **fields: Other fields of the recipe: a section with a dict, optim={"max_steps": 20}, or
            full names, **{"optim.max_steps": 20}.

    Raises: FDError: for a mistake, in a sentence; a line for each if there are several.
    """
    values = _texts(fields)
    for section, main, value in (
        ("data", "root", data),
        ("teacher", "source", teacher),
        ("student", "model", student),
        ("runtime", "run_dir", out),
    ):
        if isinstance(value, Mapping):
            _add(values, {section: dict(value)})
        elif value:
            _add(values, {f"{section}.{main}": os.fspath(value)})
    run = _run_of(recipe, values)
    if not run.frozen_models:
        raise ConfigError(
            f"recipe: not a distillation; got {run.name}, expected a recipe of distillation. "
            "Train other recipes by the command line (fd-large train), or by "
            "fd_large.evaluate(..., "
            'task="finetune").'
        )
    if run.students:
        raise ConfigError(
            f"students: a run from Python has a single student; got {', '.join(run.students)}, "
            "expected no students section. Train several students by the command line, and read "
            "each with fd_large.result(RUN/students/NAME)."
        )
    from fd_large.cli.train import check_names, train_run

    named = {*named_fields(Given(values), [])}
    if isinstance(recipe, Run) and recipe.name in registry.RECIPES:
        named |= difference(registry.get(recipe.name), recipe).keys()
    if not fresh:
        run = with_stored_ends(run, named)
    check_names(run, deepspeed_config=deepspeed_config)
    with guest():
        train_run(
            run,
            deepspeed_config=deepspeed_config,
            fresh=fresh,
            then=_draw_report,
            named=named,
        )
    return result(run.run_dir())


def result(folder: str | os.PathLike[str]) -> Result:
    """Returns the result of the run in `folder`, trained from Python or by the command line.

    Raises: FDError: if the folder is not the folder of a run.
    """
    from fd_large.report.run_files import read_run

    files = read_run(Path(folder))
    return Result(files.folder, files.summary.get("status", "not finished"), files.summary)


def load_student(
    run: str | os.PathLike[str], *, allow_code: Iterable[str | os.PathLike[str]] = ()
) -> TrainedModel:
    """Loads the student of a run, with its averaged weights if the run keeps an average.

        model = fd_large.load_student("runs/first")
        map = model(model.preprocess("photo.jpg")[None])   # (1, C, H, W)
        guess = model.teacher_map("teacher", model.preprocess("photo.jpg")[None])

    Args:
        run: Folder of a run, a checkpoint (RUN/checkpoints/best) or an export, each of which has
            the teachers' heads; or any other model that `fd-large evaluate` accepts:
            RUN#teacher, timm:NAME, a file of weights ...
        allow_code: Python files of the user's own that the run's recipe may import.

    Returns: the model in evaluation mode, in float32, on the first GPU, or the CPU.
    Raises: FDError: if the model does not exist.
    """
    from fd_large.engine.find_model import find_model
    from fd_large.engine.trained_model import TrainedModel
    from fd_large.tasks.jobs import heads_of, job_of

    for path in allow_code:
        doors.allow(path)
    import torch

    with torch.random.fork_rng(devices=cuda_devices()):
        named = find_model(os.fspath(run), job_of)
        backbone, statistics = named.build()
    # The heads must not refer to `named`, whose weights keep files open.
    job, folder = named.trained_by, named.folder

    def heads() -> Mapping[str, Any]:
        with torch.random.fork_rng(devices=cuda_devices()):
            return heads_of(job, folder)

    return TrainedModel(
        backbone,
        statistics,
        image_size=named.image_size,
        source=named.section.source,
        heads=heads,
    ).eval()


def evaluate(
    *models: str | os.PathLike[str],
    data: Value,
    task: str = "auto",
    out: str | os.PathLike[str] = "evaluation",
    **options: Any,
) -> Evaluation:
    """Measures models on labelled images, side by side, as `fd-large evaluate` does.

        fd_large.evaluate("runs/first", "runs/first#teacher", data="pets/", task="knn")

    Args:
        *models: Results, run folders or other models; see `load_student`.
        data: The labelled images (data.root), or several fields of the section: {"root": ...,
            "val_fraction": 0.1}.
        task: knn, linear, finetune or another protocol of `fd-large evaluate --task`; a protocol of
            the user's own, module:FILE.py:NAME; or auto, which stands for the task of the first
            model's run if `evaluate` can measure models by this task, and otherwise for knn.
        out: Folder for the results.
        **options: Further arguments of the command (k=10, seeds=3) and fields of the recipe; see
            `distill`.

    Raises: FDError: for a mistake, in a sentence; a line for each if there are several.
    """
    from fd_large.cli import evaluate as command

    doors.allow_named([task])  # Named by this call, as others are on the command line.
    kind = command.with_flags_of(task)
    known = hints_of(kind)
    flags = {name: value for name, value in options.items() if name in known}
    values = _texts({name: value for name, value in options.items() if name not in known})
    root = dict(data) if isinstance(data, Mapping) else {"root": os.fspath(data)}
    _add(values, {"data": root})
    for name in values:
        if name.split(".")[0] not in hints_of(Run):
            raise ConfigError(
                f"{name}: no such argument of evaluate; "
                f"{nearest(name, [*known, *hints_of(Run)])}. Correct the name."
            )
    named = [os.fspath(model) for model in models]
    base = command.scored_run(named, task) or registry.get(
        flags.get("recipe") or registry.FINETUNING_RECIPE
    )
    run = _run_of(base, values)
    recipe_fields = named_fields(Given(values), [])
    flags |= {"models": named, "task": task, "out": os.fspath(out)}
    arguments = from_plain(kind, {k: _listed(v) for k, v in flags.items()}, "")
    summary = Path(out) / SUMMARY
    before = summary.stat().st_mtime_ns if kind_of(summary) == "file" else None
    with guest():
        code = command.evaluate(arguments, recipe_fields, run)
    if code:
        raise ConfigError(
            f"evaluate: a training run ended early; got exit code {code}, expected 0. See the "
            f"logs in {out}."
        )
    written = kind_of(summary) == "file" and summary.stat().st_mtime_ns != before
    return Evaluation(
        Path(out), read_json(summary, where="evaluate", holds=dict) if written else {}
    )


# ------------------------------------------------------------------------------------------------


def _run_of(recipe: str | Run, values: dict[str, Any]) -> Run:
    """Returns a recipe with some of its fields changed; reports all mistakes at once.

    Args:
        recipe: Name of the base recipe, or the recipe itself.
        values: The changed fields, nested by section or by full names (section.field).
    """
    # The caller names code of its own here, as others do on the command line.
    doors.allow_named(value for value in flat_plain(values).values() if isinstance(value, str))
    if isinstance(recipe, str):
        run = run_of(Given(values), recipe=recipe, named=True)
    else:
        mistakes: list[str] = []
        run = accepted(named_fields(Given(values), mistakes), recipe.with_fields, mistakes)
        if mistakes:
            raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    assert run is not None
    return run


def _texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the nested dicts `values`, with each `os.PathLike` value as a str."""
    return {
        name: _texts(value)
        if isinstance(value, Mapping)
        else os.fspath(value)
        if isinstance(value, os.PathLike)
        else value
        for name, value in values.items()
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _add(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds fields of a recipe to `values`, under their full names (section.field).

    Args:
        values: The fields so far, nested by section or by full names.
        more: The fields to add, in the same form.

    Raises: ConfigError: for a field that `values` already has.
    """
    for name, value in flat_plain(_texts(more)).items():
        if name in flat_plain(values):
            raise ConfigError(
                f"{name}: given twice; got two values, expected one value. Leave out one of the "
                "two."
            )
        values[name] = value


def _draw_report(folder: str) -> None:
    """Draws the plots of the finished run in `folder`; an error is logged and not raised."""
    from fd_large.report.make import make_report

    try:
        make_report(folder)
    except Exception:
        log.exception(
            "the report failed, but the run is complete; to make the report: fd-large report %s",
            folder,
        )
