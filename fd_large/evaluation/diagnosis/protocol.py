"""Protocol of `diagnose`, which measures attention, loss landscape and similarity of layers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fd_large.errors import without_secrets
from fd_large.evaluation.protocol import Protocol, Request, Result
from fd_large.files import check_out, out_folder
from fd_large.ranks import activity
from fd_large.recipes.fields import at_least

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DiagnosisFlags:
    """Flags of a diagnosis, besides the images."""

    # Number of images, spread over the dataset without repetition.
    images: int = 64
    # Number of images in a forward. The loss landscapes use the first four batches alone.
    batch_size: int = 16
    # Folder for report.html, index.md, the plots, diagnosis.json and averages.npz.
    out: str = "diagnosis"

    def __post_init__(self) -> None:
        at_least("--images", self.images, 1, "images")
        at_least("--batch_size", self.batch_size, 1, "images")


def _measure(request: Request) -> Result:
    """Diagnoses the requested models, and writes the figures, the plots and the page."""
    flags, began = request.flags, time.monotonic()
    check_out(flags.out, where="--out", holds="folder")
    # Importing torch and deepspeed takes seconds.
    from fd_large.evaluation.diagnosis.examine import Extent, examine, num_steps, write_findings
    from fd_large.evaluation.diagnosis.models import load_model
    from fd_large.evaluation.diagnosis.sample import Sample
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.report.diagnosis import draw_diagnosis
    from fd_large.report.diagnosis_page import write_html, write_page

    full_float32(distributed.device())
    sample = Sample(flags.data.root, flags.images)
    named = activity.counted(flags.models, "loading", "models")
    models = [load_model(model, sample) for model in named]
    folder, extent = out_folder(flags.out), Extent()
    steps = num_steps(models, len(sample), flags.batch_size, extent)
    with activity.work("examining", steps) as examining:
        findings = examine(
            models,
            sample,
            batch_size=flags.batch_size,
            extent=extent,
            progress=lambda text: examining.advance(description=text),
        )
    facts = {
        "root": without_secrets(sample.root),
        "images": len(sample),
        "batch_size": flags.batch_size,
        "device": device_name(distributed.device()),
        "seconds": round(time.monotonic() - began, 1),
    }
    diagnosis = write_findings(folder, findings, facts)
    pictures = draw_diagnosis(folder, diagnosis)
    write_page(folder, diagnosis, pictures)
    page = write_html(folder, diagnosis, pictures)
    message = f"{page}: {len(sample)} images, {facts['seconds']:.0f} s"
    return Result([_summary(diagnosis["models"])], [message])


def _summary(models: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fd_large.report.diagnosis_page import notes, table

    summary = Table(title="Means over attention layers, and losses", title_justify="left")
    summary.add_column("", no_wrap=True)
    for model in models:
        summary.add_column(Text(model["label"]), justify="right", overflow="fold")
    for row in table(models):
        summary.add_row(*row)
    summary.caption, summary.caption_justify = Text("\n".join(notes(models))), "left"
    return summary


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU `device`, or "the CPU" with the number of torch's threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"


DIAGNOSIS = Protocol(
    name="diagnose",
    title="Diagnosis",
    command="diagnose",
    measure=_measure,
    flags=DiagnosisFlags,
    fields=(),
)
