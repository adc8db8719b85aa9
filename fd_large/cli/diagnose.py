"""`python -m fd_large diagnose A [B ...] --data.root FOLDER`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse
from fd_large.cli.output import tables
from fd_large.cli.paths import paths_of_models, require_paths
from fd_large.errors import without_secrets
from fd_large.files import check_out, out_folder
from fd_large.ranks import activity
from fd_large.recipes.fields import at_least


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images."""

    # Images as for training: a folder, tar shards, or builtin:photographs. Of a dataset with parts
    # that which is tested. A run that learnt labels needs images of its classes for its loss.
    root: str


@dataclass(frozen=True, kw_only=True)
class Diagnose(AllowsCode):
    """Show what models attend to, how flat their loss is and how alike their layers are.

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
    # Number of images, spread over the dataset; none is taken twice.
    images: int = 64
    # Images at a time; the loss landscapes see the first four batches.
    batch_size: int = 16
    # Folder for report.html, index.md, the plots, diagnosis.json and averages.npz.
    out: str = "diagnosis"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--images", self.images, 1, "images")
        at_least("--batch_size", self.batch_size, 1, "images")


def main(arguments: list[str]) -> int:
    """Looks at the models and prints a summary."""
    given = parse(Diagnose, arguments, command="diagnose")
    require_paths(paths_of_models(given.models) | {"data.root": given.data.root})
    return diagnose(
        given.models,
        root=given.data.root,
        images=given.images,
        batch_size=given.batch_size,
        out=given.out,
    )


def diagnose(
    models: Sequence[str],
    *,
    root: str,
    images: int = 64,
    batch_size: int = 16,
    out: str = "diagnosis",
) -> int:
    """Looks at models side by side, writes the page and prints a summary.

    Args:
        models: See `Diagnose`.
        root: Images as for training.
        images: Number of images.
        batch_size: Images at a time.
        out: Folder for the results.
    """
    check_out(out, where="--out", holds="folder")
    console = tables()
    began = time.monotonic()
    # Importing torch and deepspeed takes seconds.
    from fd_large.diagnose.examine import Extent, examine, num_steps
    from fd_large.diagnose.findings import write_findings
    from fd_large.diagnose.models import load_model
    from fd_large.diagnose.sample import Sample
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.report.diagnosis import draw_diagnosis
    from fd_large.report.diagnosis_page import write_html, write_page

    full_float32(distributed.device())
    sample = Sample(root, images)
    loaded = [load_model(model, sample) for model in activity.counted(models, "loading", "models")]
    folder, extent = out_folder(out), Extent()
    steps = num_steps(loaded, len(sample), batch_size, extent)
    with activity.work("examining", steps) as examining:
        findings = examine(
            loaded,
            sample,
            batch_size=batch_size,
            extent=extent,
            progress=lambda text: examining.advance(what=text),
        )
    facts = {
        "root": without_secrets(sample.root),
        "images": len(sample),
        "batch_size": batch_size,
        "device": _device(distributed.device()),
        "seconds": round(time.monotonic() - began, 1),
    }
    diagnosis = write_findings(folder, findings, facts)
    pictures = draw_diagnosis(folder, diagnosis)
    write_page(folder, diagnosis, pictures)
    page = write_html(folder, diagnosis, pictures)
    console.print(_summary(diagnosis))
    console.print(f"{page}: {len(sample)} images, {facts['seconds']:.0f} s", soft_wrap=True)
    return 0


def _summary(diagnosis: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fd_large.report.diagnosis_page import notes, table

    models = diagnosis["models"]
    found = Table(title="Means over attention layers, and losses", title_justify="left")
    found.add_column("", no_wrap=True)
    for model in models:
        found.add_column(Text(model["label"]), justify="right", overflow="fold")
    for row in table(models):
        found.add_row(*row)
    found.caption, found.caption_justify = Text("\n".join(notes(models))), "left"
    return found


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"
