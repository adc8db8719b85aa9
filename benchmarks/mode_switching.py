"""How near a student's heads are to its teachers at other resolutions than it was trained at.

    python benchmarks/mode_switching.py runs/one runs/several --sizes 64 128 192 256

RADIO's question (arXiv 2412.07679): a student that saw each teacher at one resolution gives
features of another kind where the resolution changes. Here the heads of stored runs are held
against their teachers on the same held-out views at each size: the loss as a share of that of the
constant prediction, and the cosine. Teachers see the images that `teacher_image_size auto` gives
them at that size.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="folders of distillations")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="sides, in pixels")
    parser.add_argument("--images", default="", help="as eval.root; else that of the first run")
    parser.add_argument("--views", type=int, default=64, help="views at each size")
    parser.add_argument("--micro_batch", type=int, default=8, help="views of a forward")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "mode_switching.json")
    return parser.parse_args()


def measure(folder: str, arguments: argparse.Namespace, images: str) -> dict[str, Any]:
    """Returns the figures of each of a run's targets at each size, and what it was trained at."""
    from fd_large.checkpoint import stream
    from fd_large.data.source import open_images
    from fd_large.engine.checkpoint_models import sources_of, stored_task
    from fd_large.ranks import distributed
    from fd_large.tasks.distillation.held_out import Crops, HeldOutViews
    from fd_large.tasks.distillation.job import DistillationJob
    from fd_large.tasks.jobs import job_of

    reader = stream.newest(Path(folder), where="runs")
    trained = job_of(reader.manifest["recipe"])
    assert isinstance(trained, DistillationJob), f"{folder} is no distillation"
    run = trained.in_one_process()
    entries = {
        name: replace(entry, teacher_image_size="auto", interpolation="auto")
        if not entry.mosaic
        else entry
        for name, entry in run.taught_by.items()
    }
    sizes = tuple(sorted({*arguments.sizes, run.data.image_size}))
    run = run.with_taught_by(entries)
    run = replace(run, data=replace(run.data, image_sizes=sizes))
    job = job_of(job_of(run).settle(sources_of(job_of)))
    assert isinstance(job, DistillationJob)
    job.weights = sources_of(job_of)
    job.parameter_sizes()  # Refuses a size that does not fit, before anything is built.
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    task = stored_task(job.make_task, reader, kind=stream.outcome(reader))
    task.to(distributed.device())
    engine: Any = SimpleNamespace(task=task, deepspeed=task)
    source = open_images(images or run.eval.root)
    found: dict[int, dict[str, float]] = {}
    for size in arguments.sizes:
        settings = replace(job.view_settings(), image_size=size)
        crops = Crops(source, arguments.views, settings, seed=0)
        views = HeldOutViews("held_out", crops, micro_batch_size=arguments.micro_batch)
        found[size] = views.measure(engine, lambda: None) | views.best_constant(
            engine, lambda: None
        )
    return {
        "trained_at": list(trained.run.data.sides),
        "steps": reader.manifest["update"],
        "targets": {
            target.label: {
                size: _of_target(numbers, target.label) for size, numbers in found.items()
            }
            for target in task.targets
        },
    }


def _of_target(numbers: dict[str, float], label: str) -> dict[str, float]:
    start = f"held_out_{label}_" if label else "held_out_"
    loss, constant = numbers[f"{start}loss"], numbers[f"{start}best_constant"]
    return {"loss": loss, "share": loss / constant, "cosine": numbers[f"{start}cosine"]}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws share and cosine over the resolution: a line a run, a row a target."""
    from fd_large.report import style

    runs = results["runs"]
    labels = list(next(iter(runs.values()))["targets"])
    figure = style.new_figure(7.4, 0.5 + 2.7 * len(labels))
    grid = figure.subplots(len(labels), 2, squeeze=False)
    shown = {"share": "loss / constant prediction", "cosine": "cosine"}
    colours = (style.BLUE, style.VERMILLION, style.GREEN, style.GREY)
    for row, label in zip(grid, labels, strict=True):
        for axes, (name, words) in zip(row, shown.items(), strict=True):
            style.plain_axes(axes)
            for number, (title, one) in enumerate(runs.items()):
                sizes = [int(size) for size in one["targets"][label]]
                values = [of_size[name] for of_size in one["targets"][label].values()]
                colour = colours[number % len(colours)]
                axes.plot(sizes, values, color=colour, label=title)
                for size, value in zip(sizes, values, strict=True):
                    is_trained = size in one["trained_at"]
                    face = colour if is_trained else "white"
                    axes.plot(size, value, "o", color=colour, markerfacecolor=face)
            axes.set_xticks(sizes)
            axes.set_title(f"{label}: {words}" if label else words, size=style.TEXT_SIZE)
            axes.set_xlabel("side of the images, px", size=style.SMALL_SIZE)
    grid[0][0].axhline(1.0, color=style.LIGHT_GREY, linewidth=1, zorder=0)
    grid[0][1].legend(
        frameon=False, fontsize=style.SMALL_SIZE, title="filled: trained at this size"
    )
    harness.save(figure, path)


def main() -> int:
    """Measures, prints a table, writes JSON and plot."""
    arguments = parse()
    runs: dict[str, Any] = {}
    for folder in arguments.runs:
        runs[Path(folder).resolve().name] = measure(folder, arguments, arguments.images)
    results = {**harness.conditions(__file__, __doc__), "views": arguments.views, "runs": runs}
    harness.write(results, arguments.out)
    draw(results, arguments.out.with_suffix(".png"))
    for title, one in runs.items():
        print(f"{title}: {one['steps']} steps at {' '.join(map(str, one['trained_at']))} px")
        for label, sizes in one["targets"].items():
            for size, of_size in sizes.items():
                print(
                    f"  {label or 'teacher'} {size:>5} px: loss {of_size['loss']:.3f}, "
                    f"{of_size['share']:.3f} of the constant prediction's, "
                    f"cosine {of_size['cosine']:.3f}"
                )
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
