"""The command `fd-large diagnose A [B ...] --data.root FOLDER`, which examines models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.cli.evaluate import measured
from fd_large.cli.paths import paths_of_models, require_paths
from fd_large.evaluation.diagnosis.protocol import DIAGNOSIS, DiagnosisFlags


@dataclass(frozen=True, kw_only=True)
class Data:
    """Flags of the images."""

    # Images of the same kinds as for training: a folder, tar shards, or builtin:photographs. If the
    # dataset has a training and a test part, the test part is used. The loss of a run that learnt
    # labels needs images of the run's classes.
    root: str


@dataclass(frozen=True, kw_only=True)
class Diagnose(DiagnosisFlags, AllowsCode):
    """Show attention, flatness of the loss and similarity of layers of models.

    A MODEL may be a model of a run, whose folder is RUN. RUN is the student, with the loss of the
    run's task besides the loss of the model alone; RUN#student is the student without the loss of
    the task; RUN#teacher is the teacher; RUN#scratch is the student with random weights. Or a MODEL
    may be a source of weights: a file, a folder, hf:REPO, open_clip:ARCH/TAG, timm:NAME or
    module:PATH/TO/FILE.py:NAME. If weights do not show their model, the model's name is put before
    their source, NAME=SOURCE, such as timm:vit_tiny_patch16_224=random. docs/diagnose.md explains
    the figures.
    """

    # Models to diagnose, which are shown side by side.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL [MODEL ...]")]
    # The images, see --data.root.
    data: Data

    def __post_init__(self) -> None:
        AllowsCode.__post_init__(self)
        DiagnosisFlags.__post_init__(self)


def main(arguments: list[str]) -> int:
    """Examines models by `diagnose`, and prints a summary; returns the exit code."""
    options = parse(Diagnose, arguments, command="diagnose")
    require_paths(paths_of_models(options.models) | {"data.root": options.data.root})
    return measured(DIAGNOSIS, options, {})
