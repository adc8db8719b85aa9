"""The command `fd-large embed MODEL --data.root FOLDER --out FILE`, which writes features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.cli.paths import paths_of_models, require_paths
from fd_large.cli.stopping import ending_with
from fd_large.data.roots import require, require_dataset
from fd_large.errors import ConfigError
from fd_large.files import check_out
from fd_large.ranks import activity
from fd_large.ranks.processes import check_workers
from fd_large.recipes import sections
from fd_large.recipes.fields import at_least

_FORMATS = (".parquet", ".npz", ".csv")
_STOPPED = (
    "embed: stopped before the end; got a signal, expected to embed all images. Complete parts "
    "are kept. Start the same command again to embed the rest."
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Flags of the images and their loading."""

    # Images of the same kinds as for training, without labels: a folder, tar shards, or
    # builtin:photographs.
    root: str
    # Side of the centre crops in pixels. 0: the side in the model's training.
    image_size: int = 0
    # Number of loader processes per rank. 0 loads in the main process.
    workers: int = sections.Data.workers
    # Largest number of pixels of an image. Larger images are left out.
    max_pixels: int = sections.Data.max_pixels


@dataclass(frozen=True, kw_only=True)
class Embed(AllowsCode):
    """Write the features of all images of a folder to a table, in the order of their names.

    MODEL may be a model of a run, whose folder is RUN: RUN is the student, RUN#teacher the teacher,
    and RUN#scratch the student with random weights. Or MODEL may be a source of weights: a file, a
    folder, an export, hf:REPO, open_clip:ARCH/TAG, timm:NAME or module:PATH/TO/FILE.py:NAME. If
    weights do not show their model, the model's name is put before their source, NAME=SOURCE.

    A row of the table has the image's path below the folder and the image's feature in float32. The
    table is the same to the bit for any number of ranks (torchrun or deepspeed). If the command was
    stopped or killed, the same command continues it. Unreadable images are named and left out.
    """

    # Model whose features are written.
    model: Annotated[str, Positional, arg(metavar="MODEL")]
    # The images.
    data: Data
    # File to which the table is written, a new FILE.parquet, FILE.npz or FILE.csv.
    out: str
    # Feature of an image. mean: the mean of its patch tokens. cls: its class token. map: its whole
    # map (height, width, channels), for .npz alone.
    pool: Literal["mean", "cls", "map"] = "mean"
    # Source of the features, for the student of a distillation run or for an export of that
    # student. own: the student's map. NAME: the output of its head for the map of the teacher NAME.
    # NAME.summary: the output of its head for the summary of the teacher NAME.
    features: str = "own"
    # Number of images in a forward. It changes the last bits of the features.
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--batch_size", self.batch_size, 1, "images")
        at_least("--data.image_size", self.data.image_size, 0, "pixels, or 0")
        at_least("--data.max_pixels", self.data.max_pixels, 0, "pixels")
        at_least("--data.workers", self.data.workers, 0, "processes")
        suffix = Path(self.out).suffix
        formats = (".npz",) if self.pool == "map" else _FORMATS
        if suffix not in formats:
            raise ConfigError(
                f"--out: unknown kind of table for --pool {self.pool}; got {self.out!r}, expected "
                f"a name that ends in {' or '.join(formats)}. Change the name."
            )


def main(arguments: list[str]) -> int:
    """Writes the table of images' features, and prints a line about it; returns the exit code."""
    options = parse(Embed, arguments, command="embed")
    data, out = options.data, Path(options.out)
    require_paths(paths_of_models([options.model]) | {"data.root": data.root})
    require_dataset(data.root, where="data.root")
    check_workers(data.workers)
    check_out(out, where="--out")
    if out.suffix == ".parquet":
        require("pyarrow", options.out, "--out")
    with ending_with(_STOPPED):
        rows, side = embed(options)
    from fd_large.ranks import distributed

    if distributed.is_main():
        print(f"{out}: {rows:,} rows, {options.pool} of {options.model}, images of {side} px")
    return distributed.leave(0)


def embed(options: Embed) -> tuple[int, int]:
    """Writes the table of images' features.

    Every rank has to call this function.

    Returns: the number of rows, and the side of the crops in pixels.

    Raises: FDError: for the user's mistakes.
    """
    with activity.work("loading torch"):  # Seconds.
        from fd_large.data.source import open_images
        from fd_large.engine.find_model import find_model
        from fd_large.evaluation import embedding
        from fd_large.kernels.precision import full_float32
        from fd_large.ranks import distributed, meeting
        from fd_large.runtime import logs
        from fd_large.tasks.jobs import job_of

    data = options.data
    logs.start(distributed.start().rank)
    full_float32(distributed.device())
    images = meeting.meet(lambda: open_images(data.root))
    model = meeting.meet(lambda: find_model(options.model, job_of, image_size=data.image_size))
    rows = embedding.embed(
        model,
        images,
        Path(options.out),
        root=data.root,
        feature=options.features,
        pool=options.pool,
        batch_size=options.batch_size,
        workers=data.workers,
        max_pixels=data.max_pixels,
    )
    return rows, model.image_size
