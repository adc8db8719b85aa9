"""`python -m fd_large predict RUN IMAGE ...`, and `evaluate RUN` of a run of the task detection."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli.arguments import parse
from fd_large.cli.export import read_recipe
from fd_large.errors import ConfigError, DataError
from fd_large.recipes.run import Run

if TYPE_CHECKING:
    from fd_large.checkpoint.read import Reader
    from fd_large.tasks.detection.scores.evaluation import Detect


# Fields of a recipe that an evaluation of boxes and masks takes; all else is the run's.
DETECTION_FIELDS = ("data.root", "data.workers", "data.max_pixels")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Draw the boxes and masks that a run's detector sees in images, and write them as JSON.

    predictions.json has for each image a list of class, score, bbox (left, top, width, height in
    its pixels) and segmentation (COCO's run lengths). An image that cannot be read is reported and
    left out; the exit code is 2 then.
    """

    # Folder of a run of the task detection.
    run: Annotated[str, Positional, arg(metavar="RUN")]
    # Image files.
    images: Annotated[tuple[str, ...], Positional, arg(metavar="IMAGE [IMAGE ...]")]
    # Folder for predictions.json and NAME.png of each image.
    out: str = "predictions"
    # Least score of what is drawn and written, in [0, 1].
    score: float = 0.5


def main(arguments: list[str]) -> int:
    """Runs the detector."""
    return predict(**vars(parse(Predict, arguments, command="predict")))


def predict(run: str, images: tuple[str, ...], out: str = "predictions", score: float = 0.5) -> int:
    """Runs a run's detector on images; returns the exit code.

    Args:
        run: Folder of a run of the task detection.
        images: Image files.
        out: Folder for predictions.json and the drawn images.
        score: Least score of what is drawn and written.
    """
    recipe = _detection(run, where="predict")
    for path in images:
        if not Path(path).is_file():
            raise ConfigError(
                f"predict: {path}: no image; got a path that is no file, expected image files. "
                "Name files."
            )
    # torch: seconds.
    from fd_large.checkpoint import stream
    from fd_large.data.decode import decode
    from fd_large.data.folder import read_image
    from fd_large.tasks.dense.geometry import resized_view
    from fd_large.tasks.detection.job import test_size
    from fd_large.tasks.detection.scores.annotated_images import draw_image, marks_of
    from fd_large.tasks.detection.scores.collect import to_results
    from fd_large.tasks.detection.scores.results import write_text

    reader = stream.newest(Path(run), where="predict")
    detect = _detector(recipe, reader)
    names = dict(enumerate(reader.manifest["categories"].values()))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    short, long = test_size(recipe)
    told: dict[str, list[dict[str, Any]]] = {}
    unread = 0
    for path in dict.fromkeys(images):
        try:
            image = decode(read_image(path), path, max_pixels=recipe.data.max_pixels)
        except DataError as error:
            print(error, file=sys.stderr)
            unread += 1
            continue
        view = resized_view(*image.shape[-2:], short_side=short, long_side=long)
        found = to_results(
            detect(*_alone(view.image(image)))[0],
            image_id=0,
            size=view.size,
            original_size=image.shape[-2:],
            category_ids=range(len(names)),
        )
        told[path] = [
            {
                "class": names[result["category_id"]],
                **{key: result[key] for key in ("score", "bbox", "segmentation")},
            }
            for result in found
            if result["score"] >= score
        ]
        # Two files of one name in different folders are kept apart.
        drawn = folder / f"{len(told)}_{Path(path).stem}.png"
        draw_image(image.permute(1, 2, 0).numpy(), marks_of(told[path]), drawn)
        print(f"{path}: {len(told[path])} objects, {drawn}")
    write_text(folder / "predictions.json", json.dumps(told, indent=1) + "\n")
    print(folder / "predictions.json")
    return 2 if unread else 0


def evaluate_run(run: str, *, changes: Mapping[str, Any], out: str) -> int:
    """Scores a run's detector on the val split of a data set; all ranks that were started share it.

    Args:
        run: Folder of the run.
        changes: Fields of the section `data` to others than the run's; with another `root` its val
            split is taken.
        out: Folder for results.json, scores.json and images.
    """
    recipe = _detection(run, where="evaluate")
    recipe = replace(recipe, data=replace(recipe.data, **changes))
    if "root" in changes:
        recipe = replace(recipe, eval=replace(recipe.eval, root=""))
    # torch: seconds.
    from fd_large import distributed
    from fd_large.checkpoint import stream
    from fd_large.cli.score_detections import classes_table, numbers_table
    from fd_large.runtime import logs
    from fd_large.tasks.detection.job import DetectionJob, test_size
    from fd_large.tasks.detection.scores.evaluation import evaluate, keep

    launch = distributed.start()
    logs.start(launch.rank)
    reader = distributed.together(lambda: stream.newest(Path(run), where="evaluate"))
    classes = tuple(reader.manifest["categories"].values())
    pictures = distributed.together(lambda: DetectionJob(recipe).test_images(classes))
    detect = distributed.together(lambda: _detector(recipe, reader))
    folder, micro = Path(out), recipe.batch.micro_batch_size
    folder.mkdir(parents=True, exist_ok=True)
    with _bar(shown=distributed.is_main()) as advance:
        outcome = evaluate(
            detect,
            pictures,
            folder,
            test_size=test_size(recipe),
            batch_size=1 if micro == "auto" else micro,
            workers=recipe.data.workers,
            max_pixels=recipe.data.max_pixels,
            between=advance,
        )
    if outcome is not None:
        from rich.console import Console

        drawn = keep(outcome, pictures, folder, draw=True, max_pixels=recipe.data.max_pixels)
        # A pipe has no width of its own; classes have long names.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(numbers_table(outcome.scores))
        console.print(classes_table(outcome.scores))
        for path in (folder / "results.json", folder / "scores.json", *drawn):
            console.print(str(path), soft_wrap=True)
    return distributed.leave(0)


def detects(run: str) -> bool:
    """Whether a path is the folder of a run of the task detection."""
    return (Path(run) / "recipe.json").is_file() and read_recipe(
        Path(run), where="evaluate"
    ).task.name == "detection"


# ------------------------------------------------------------------------------------------------


def _detection(run: str, *, where: str) -> Run:
    """A run's recipe.

    Raises: ConfigError: if the run detects nothing.
    """
    recipe = read_recipe(Path(run), where=where)
    if recipe.task.name != "detection":
        raise ConfigError(
            f"{where}: {run}: sees no boxes; got a run of the task {recipe.task.name}, expected "
            "detection. Train one: --recipe coco_mask_rcnn_swinv2_tiny --student.init RUN."
        )
    return recipe


def _detector(recipe: Run, reader: Reader) -> Detect:
    """The detector of a checkpoint, whole on this rank's device."""
    from fd_large import distributed
    from fd_large.checkpoint import stream
    from fd_large.engine.checkpoint_models import stored_task
    from fd_large.engine.zero.config import computes_in_bfloat16
    from fd_large.tasks.detection.job import DetectionJob

    task = stored_task(DetectionJob(recipe).make_task, reader, kind=stream.outcome(reader))
    if computes_in_bfloat16(recipe.engine.precision):
        task.bfloat16()
    return task.to(distributed.device()).eval().detect


def _alone(image: Any) -> tuple[Any, Any]:
    """A batch of one image (3, H, W) and its size, on the device."""
    import torch

    from fd_large import distributed

    device = distributed.device()
    return image[None].to(device), torch.tensor([image.shape[-2:]], device=device)


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("detecting", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not shown) as progress:
        task = progress.add_task("detecting", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
