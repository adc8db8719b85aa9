"""What is asked of every dense task's job: its check, and its student as a file of weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stored_run import store_tensors
from torch import Tensor, nn

from fd_large.cli.export import export
from fd_large.engine.checkpoint_models import sources_of
from fd_large.recipes.run import Run
from fd_large.tasks.jobs import job_of
from fd_large.weights.load import load_model


def with_root(run: Run, root: str | Path) -> Run:
    """Returns a run on the dataset of a folder."""
    return replace(run, data=replace(run.data, root=str(root)))


def check(run: Run) -> Any:
    """Opens a run's samples and checks it, as a start does; returns its job."""
    job = job_of(run)
    job.open_samples()
    job.check()
    return job


class Exported(NamedTuple):
    """A student that was exported.

    `trained` has the parameters of its task, `stored` the model as the run's folder gives it,
    `model` and `facts` are what loading the file makes.
    """

    trained: dict[str, Tensor]
    stored: Any
    model: nn.Module
    facts: Any


def exported(run: Run, folder: Path, to: str, *, told: str) -> Exported:
    """Stores a run of the dataset /somewhere/NAME, of two ranks, and exports its student.

    Args:
        run: The recipe.
        folder: For the run and the file.
        to: The format of the file.
        told: What the model card says of the task.
    """
    torch.manual_seed(0)
    task = job_of(run).make_task()
    trained = {name: parameter.detach() for name, parameter in task.named_parameters()}
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps(run.to_dict()))
    store_tensors(folder / "run", trained, ranks=2, recipe=run.to_dict())
    export(str(folder / "run"), str(folder / "out"), to)
    card = (folder / "out" / "README.md").read_text()
    assert told in card
    assert "somewhere" in run.data.root
    assert "somewhere" not in card
    stored = sources_of(job_of).resolve(folder / "run").stored.file
    return Exported(trained, stored, *load_model(folder / "out"))
