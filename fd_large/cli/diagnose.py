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

    # Images as for training: a folder, tar shards, or builtin:photographs. Of a dataset with parts,
    # the test part. A run that learnt labels needs images of its classes for its loss.
    root: str


@dataclass(frozen=True, kw_only=True)
class Diagnose(DiagnosisFlags, AllowsCode):
    """Show attention, flatness of the loss and similarity of layers of models.

    A model is RUN (its student, with the loss of the run's task beside that of the model alone),
    RUN#student (the same model alone), RUN#teacher or RUN#scratch; a file or folder of weights,
    hf:REPO, open_clip:ARCH/TAG, timm:NAME or module:PATH/TO/FILE.py:NAME; or NAME=SOURCE for
    weights that do not show their model, such as timm:vit_tiny_patch16_224=random.
    docs/diagnose.md explains the figures.
    """

    # One model or several, side by side.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL [MODEL ...]")]
    # Images.
    data: Data

    def __post_init__(self) -> None:
        AllowsCode.__post_init__(self)
        DiagnosisFlags.__post_init__(self)


def main(arguments: list[str]) -> int:
    """Examines models by `diagnose`, and prints a summary; returns the exit code.

    Args:
        arguments: The arguments after `diagnose`, which name the models and the images.
    """
    options = parse(Diagnose, arguments, command="diagnose")
    require_paths(paths_of_models(options.models) | {"data.root": options.data.root})
    return measured(DIAGNOSIS, options, {})
