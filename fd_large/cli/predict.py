"""The command `fd-large predict RUN IMAGE ...`, which draws predictions for images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.errors import ConfigError
from fd_large.files import check_out, kind_of
from fd_large.recipes.fields import within
from fd_large.recipes.stored import read_recipe, run_of_checkpoint

if TYPE_CHECKING:
    from fd_large.tasks.stored_run import Predicted

LEAST_SCORE = 0.5


@dataclass(frozen=True, kw_only=True)
class Predict(AllowsCode):
    """Draw a run's predictions for images: boxes and masks, or the class or depth of pixels.

    The command also writes predictions.json. For a detector, this file has a list of objects for
    each image, each with class, score, bbox (left, top, width and height in pixels of the image)
    and segmentation (COCO's run lengths). docs/segmentation.md and docs/depth.md describe the
    entries of the other tasks. An image that cannot be read is reported and left out, and the exit
    code is then 2.
    """

    # Folder of a run of detection, segmentation or depth.
    run: Annotated[str, Positional, arg(metavar="RUN")]
    # Image files.
    images: Annotated[tuple[str, ...], Positional, arg(metavar="IMAGE [IMAGE ...]")]
    # Folder for predictions.json, and for NAME.png of each image NAME.
    out: str = "predictions"
    # Smallest score of a detected object that is drawn and written, in [0, 1]. None: 0.5.
    score: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is not None:
            within("--score", self.score, "[0, 1]")


def main(arguments: list[str]) -> int:
    """Draws a run's predictions for images, and prints a line for each image.

    Returns: the exit code, 2 if an image cannot be read, else 0.
    """
    options = parse(Predict, arguments, command="predict")
    unread = 0
    for prediction in predict(options.run, options.images, out=options.out, score=options.score):
        if prediction.problem:
            print(prediction.problem, file=sys.stderr)
            unread += 1
        else:
            print(f"{prediction.path}: {prediction.text}, {prediction.drawn}")
    print(Path(options.out) / "predictions.json")
    return 2 if unread else 0


def predict(
    run: str, images: Sequence[str], *, out: str = "predictions", score: float | None = None
) -> Iterator[Predicted]:
    """Runs the model of a run on images, and yields the prediction of each image.

    `Predict` describes the arguments.

    Raises: FDError: if the run or an image does not exist, if the run's task has no predictions, or
        if `score` is given and the task's predictions have no scores.
    """
    recipe = read_recipe(run_of_checkpoint(run), where="predict")
    kind = recipe.task.kind()
    if score is not None and kind and not kind.predicts_scores:
        raise ConfigError(
            f"--score: the predictions of the task {recipe.task.name} have no scores; got {score}, "
            "expected no limit. Leave out --score."
        )
    missing = [path for path in images if kind_of(path, where="predict") != "file"]
    if missing:
        raise ConfigError(
            f"predict: not an image file; got {', '.join(missing)}, expected files that exist. "
            "Name image files."
        )
    check_out(out, where="--out", holds="folder")
    # Importing torch takes seconds.
    from fd_large.checkpoint import stream
    from fd_large.tasks.jobs import job_of, stored_run_of

    reader = stream.newest(Path(run), where="predict")
    least_score = LEAST_SCORE if score is None else score
    stored = stored_run_of(job_of(recipe))
    return stored.predict(reader, images, Path(out), least_score=least_score)
