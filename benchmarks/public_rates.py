"""How long should published measurements of steps take by the time model of `plan`?

    python benchmarks/plan.py --public      compares them: a table, and results/plan_public.png
    python benchmarks/public_rates.py       counts their models again, on the meta device

public_rates.json has a row for each measurement (source, how it was measured, settings) and the
counts of the models, so that the comparison needs no torch. A row is clean if only a step was
timed, with software and a card that are not too old. The time model stands in for other software as
follows: stage 0 for DDP, stage 1 for NeMo's distributed optimiser, stage 3 without hooks for FSDP2,
plain torch for all kernels, and a fine-tuning step for all tasks. Two views that pass through the
backbone one after the other are planned as one micro-batch, whose hooks run twice.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

sys.path[:0] = [str(ROOT)]

from fd_large.files import read_json  # noqa: E402
from fd_large.plan.candidate import Candidate  # noqa: E402
from fd_large.plan.cluster import Cluster, Machine  # noqa: E402
from fd_large.plan.counts import Counts  # noqa: E402
from fd_large.plan.rates import CARDS, Rates, of_data_sheet  # noqa: E402
from fd_large.plan.step_time import StepSeconds, estimate  # noqa: E402
from fd_large.plan.workload import Workload  # noqa: E402

FILE = Path(__file__).with_suffix(".json")
KNOWN_CARDS = CARDS | {
    "rtx3090": of_data_sheet("RTX 3090", "8.6", 24, 71, 0.936, 32),
    "v100": of_data_sheet("V100", "7.0", 16, 125, 0.9, 150),
}
# A step of each model; the images decide nothing, for counts are straight lines.
RECIPE = "finetune_clip_vit_base_100ep"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Published measurement of a step.

    Attributes:
        id: Name of the row.
        net: Name of the model in the counts.
        card: Name of the card, a key of `KNOWN_CARDS`.
        gpus: Number of GPUs, in nodes of 8.
        sharding: Name that the software has for its sharding.
        stage: Stage of ZeRO that stands in for this sharding.
        micro_batch: Images per GPU in a micro-batch, counting all views.
        accumulation: Number of micro-batches of a step.
        backbone_calls: Number of calls of the model in which a micro-batch is computed.
        nic_gigabits: Rate of a GPU's network card in Gb/s.
        seconds: Measured seconds of a step.
        clean: Whether only a step was timed.
        source: Publication of the measurement.
        measured: How the step was measured, and which assumptions are made.
    """

    id: str
    net: str
    card: str
    gpus: int
    sharding: str
    stage: Any
    micro_batch: int
    accumulation: int
    backbone_calls: int
    nic_gigabits: float
    seconds: float
    clean: bool
    source: str
    measured: str

    @property
    def rates(self) -> Rates:
        """Rates of the card for this row's software.

        They include the time of hooks only for ZeRO-3, since no other software has such hooks.
        """
        hooked = 1.0 if self.sharding == "ZeRO-3" else 0.0
        return replace(KNOWN_CARDS[self.card], hooked_share=hooked)


def read() -> tuple[list[Row], dict[str, Counts]]:
    """Returns the rows, and the counts of the models by name."""
    stored = read_json(FILE, holds=dict)
    counts = {net: Counts.from_plain(plain) for net, plain in stored["counts"].items()}
    return [Row(**row) for row in stored["rows"]], counts


def planned(row: Row, counts: Counts, rates: Rates) -> StepSeconds:
    """Returns the seconds that the time model predicts for a row.

    Args:
        row: The row.
        counts: Counts of the row's model.
        rates: Rates of the row's card.
    """
    passes = {phase: row.backbone_calls * n for phase, n in counts.modules.items()}
    load = Workload(
        counts={False: replace(counts, modules=passes)},
        global_batch_size=row.gpus * row.micro_batch * row.accumulation,
    )
    cluster = Cluster(
        gpus=row.gpus, gpus_per_node=8, nic_gigabits=row.nic_gigabits, nics_per_node=8
    )
    candidate = Candidate(stage=row.stage, micro_batch_size=row.micro_batch)
    return estimate(load, candidate, Machine(cluster=cluster, rates=rates)).seconds


def lines(rows: list[Row], counts: dict[str, Counts]) -> list[str]:
    """Returns the lines of a Markdown table of measured and predicted seconds per step.

    Args:
        rows: The measurements.
        counts: Counts of each model, by its name (`Row.net`).
    """
    table = [
        "| row | GPUs | sharding | images | measured, s | planned, s | measured / planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = planned(row, counts[row.net], row.rates)
        cells = (
            row.id + ("" if row.clean else " (not clean)"),
            f"{row.gpus} {KNOWN_CARDS[row.card].name.split(' SXM')[0]}",
            row.sharding,
            f"{row.micro_batch} x {row.accumulation}",
            f"{row.seconds:.3f}",
            f"{seconds.between.low:.3f} to {seconds.between.high:.3f}",
            f"{row.seconds / seconds.total:.2f}",
        )
        table.append(f"| {' | '.join(cells)} |")
    return table


def outside(rows: list[Row], counts: dict[str, Counts]) -> list[str]:
    """Returns the names of clean rows whose measured seconds are outside of the predicted range.

    Args:
        rows: The measurements. A row is clean if only a step was timed.
        counts: Counts of each model, by its name (`Row.net`).
    """
    ranges = {row.id: planned(row, counts[row.net], row.rates).between for row in rows}
    return [
        row.id
        for row in rows
        if row.clean and not ranges[row.id].low <= row.seconds <= ranges[row.id].high
    ]


def report() -> int:
    """Prints and draws the comparison; returns 1 if a clean row is outside of its range, else 0."""
    rows, counts = read()
    print("\n".join(lines(rows, counts)))
    plot(rows, counts, RESULTS / "plan_public.png")
    outliers = outside(rows, counts)
    print(f"outside of the range: {', '.join(outliers) or 'no clean row'}")
    return int(bool(outliers))


def plot(rows: list[Row], counts: dict[str, Counts], path: Path) -> None:
    """Draws the ratio of measured to predicted seconds of each row, with the predicted range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    colours = {"ZeRO-3": "#c4452d", "FSDP2": "#2f6fb0"}
    figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        seconds = planned(row, counts[row.net], row.rates)
        low, high = (edge / seconds.total for edge in seconds.between)
        axes.barh(place, high - low, left=low, height=0.8, color="#dfe5ea")
        colour = colours.get(row.sharding, "#333333")
        axes.plot(
            row.seconds / seconds.total,
            place,
            "o",
            color=colour,
            markerfacecolor=colour if row.clean else "white",
        )
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.id for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 0.75, 1, 1.25, 1.5, 2, 3]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(0.6, 3.4)
    axes.set_xlabel("measured seconds of a step / planned ones (bar: the printed range)")
    kinds = {"no hooks": "#333333", "FSDP2": colours["FSDP2"], "ZeRO-3": colours["ZeRO-3"]}
    handles = [axes.plot([], [], "o", color=c, label=name)[0] for name, c in kinds.items()]
    handles += axes.plot(
        [], [], "o", color="#333333", markerfacecolor="white", label="not a step alone"
    )
    axes.legend(handles=handles, loc="upper right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)


def count_again() -> None:
    """Counts the steps of all models again, and writes the counts to public_rates.json."""
    from timm.models import register_model
    from timm.models.vision_transformer import _create_vision_transformer

    from fd_large.cli.plan_workload import workload
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    def vit_e_patch14_224(**settings: Any) -> Any:
        # The ViT-e of PaLI (arXiv 2209.06794), as timm builds a ViT; timm itself has none.
        shape = {"embed_dim": 1792, "depth": 56, "num_heads": 16, "mlp_ratio": 15360 / 1792}
        settings = {**shape, "patch_size": 14, **settings}
        return _create_vision_transformer("vit_giant_patch14_224", **settings)

    vit_e_patch14_224.__module__ = _create_vision_transformer.__module__
    register_model(vit_e_patch14_224)
    stored = read_json(FILE, holds=dict)
    run = registry.get(RECIPE)
    written = {}
    for net, model in stored["nets"].items():
        side = 256 if model.endswith("256") else 224
        variant = replace(
            run,
            student=replace(run.student, model=model, architecture=Architecture()),
            data=replace(run.data, image_size=side),
        )
        counts = workload(variant, CARDS["h200"], "reference").counts[False]
        written[net] = json.dumps(counts.to_plain()).replace(" ", "")
        before = json.dumps(stored["counts"][net]).replace(" ", "")
        print(net, "as before" if written[net] == before else "changed")
    rows = ",\n".join(f"  {json.dumps(row)}" for row in stored["rows"])
    each = ",\n".join(f'  "{net}": {text}' for net, text in written.items())
    FILE.write_text(
        f'{{"rows": [\n{rows}\n],\n"nets": {json.dumps(stored["nets"])},\n'
        f'"counts": {{\n{each}\n}}}}\n'
    )


if __name__ == "__main__":
    count_again()
