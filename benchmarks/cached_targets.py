"""How much time does a step save with stored maps, and how much does rounding change the maps?

    python benchmarks/cached_targets.py --quick
    python benchmarks/cached_targets.py --models RUN#teacher RUN vit_base_patch16=random

It answers two questions, on one rank. (1) How far is a stored map from the teacher's? The answer is
the smooth L1 (beta 2) between the two whitened maps, and its ratio to the loss of predicting zero,
for each precision and model. Losses of a student below this floor mean nothing. (2) How long does a
step take with stored maps and with the teacher? Both are timed in turns, with reading and decoding,
and compared with the share of the FLOPs that is not the teacher's. The losses of the two runs are
compared, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness

ROUNDS, WARM_UP = 8, 1
CROPS = 64
GLOBAL_BATCH = 16
LEARNING_RATE = 1e-3


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[], help="whose maps; as evaluate has them")
    parser.add_argument("--images", default="builtin:photographs", help="as data.root")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each way to train")
    parser.add_argument("--crops", type=int, default=CROPS, help="views whose maps are compared")
    parser.add_argument("--quick", action="store_true", help="few crops and turns, a tiny teacher")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "cached_targets.json")
    return parser.parse_args()


def rounding(names: list[str], root: str, crops: int) -> dict[str, dict[str, Any]]:
    """Returns how much storing changes the maps of each model, by the model's label.

    In the entry of a model, `floor` has the smooth L1 between stored and exact maps for each
    precision, and `share_of_zero_prediction` its ratio to the smooth L1 of a prediction of zero.

    Args:
        names: The models, as `evaluate` takes them.
        root: The images, as data.root.
        crops: Number of views.
    """
    import torch
    import torch.nn.functional as F

    from fd_large.backbones.statistics import normalise
    from fd_large.data.source import open_images
    from fd_large.data.views import FixedViews, ViewSettings, jittered_view
    from fd_large.engine.find_model import find_models
    from fd_large.kernels.whitened_loss import whiten
    from fd_large.tasks.distillation.cached.files import PRECISIONS, decode, encode
    from fd_large.tasks.jobs import job_of

    images, floors = open_images(root), {}
    for model in find_models(names, job_of) if names else ():
        net, statistics = model.build()
        settings = ViewSettings(model.image_size, 0.25)
        sums: dict[str, float] = dict.fromkeys(["zero", *PRECISIONS], 0.0)
        largest = 0.0
        for number in range(crops):
            draws = FixedViews(1, 0).draws(0, number % len(images))
            view = jittered_view(images, number % len(images), draws, settings)
            with torch.no_grad():
                tokens = net(normalise(view[None], statistics)).tokens
            target = whiten(tokens)
            largest = max(largest, target.abs().max().item())
            sums["zero"] += F.smooth_l1_loss(torch.zeros_like(target), target, beta=2.0).item()
            for precision in PRECISIONS:
                back = whiten(decode(encode(tokens, precision), tokens.dtype))
                sums[precision] += F.smooth_l1_loss(back, target, beta=2.0).item()
        means = {name: total / crops for name, total in sums.items()}
        floors[model.label] = {
            "tokens": tokens.shape[1] * crops,
            "width": tokens.shape[2],
            "largest_value": largest,
            "floor": {p: means[p] for p in PRECISIONS},
            "share_of_zero_prediction": {p: means[p] / means["zero"] for p in PRECISIONS},
        }
    return floors


def cut(root: str, folder: Path) -> Path:
    """Writes `CROPS` different crops of the images in the dataset `root` as PNG files.

    The files are written to `folder`, which must not exist yet; the result is `folder`.

    A cache has one entry for each image, so that a few images alone would not fill it.
    """
    from torchvision.io import write_png

    from fd_large.data.source import open_images
    from fd_large.data.views import FixedViews, ViewSettings, jittered_view

    images, settings = open_images(root), ViewSettings(256, 0.5)
    folder.mkdir()
    for number in range(CROPS):
        draws = FixedViews(1, 1).draws(0, number)
        view = jittered_view(images, number % len(images), draws, settings)
        write_png(view, str(folder / f"{number:03d}.png"))
    return folder


def side_by_side(root: Path, folder: Path, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Returns the seconds and the losses of steps with stored maps and with the teacher.

    Args:
        root: Folder of the images.
        folder: Folder for the caches.
        rounds: Number of timed steps with the teacher, and with maps of each precision.
        quick: Whether the teacher is tiny.
    """
    from engines import seconds_in_turns, zero_engine

    from fd_large.cli.cache import write
    from fd_large.data.loader import Batch
    from fd_large.data.sampler import Portion
    from fd_large.engine.counting.count import step_flops
    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero import start
    from fd_large.engine.zero.optimizer import set_learning_rate
    from fd_large.ranks import distributed
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture
    from fd_large.recipes.fields import override
    from fd_large.tasks.distillation.cached.files import PRECISIONS
    from fd_large.tasks.distillation.job import DistillationJob
    from fd_large.weights.resolve import Sources

    distributed.start()
    start.start()
    size = 112
    wide = (96, 2, 3) if quick else (256, 8, 4)
    run = registry.get("fd_clip_vit_base")
    shapes = [
        Architecture(embed_dim=w, depths=(d,), num_heads=(h,), image_size=size)
        for w, d, h in ((192, 4, 3), wide)
    ]
    run = replace(
        run,
        student=replace(run.student, architecture=shapes[0], drop_path_rate=0.0),
        teacher=replace(run.teacher, architecture=shapes[1], source="random"),
    )
    fields = {
        "data.root": str(root),
        "data.image_size": size,
        "data.workers": 0,
        "batch.global_batch_size": GLOBAL_BATCH,
        "batch.micro_batch_size": GLOBAL_BATCH,
        "task.distillation.views": 1,
    }
    run = override(run, fields)
    runs = {"live": run}
    for precision in PRECISIONS:
        out = folder / precision
        write(run, str(out), precision=precision)
        runs[precision] = override(run, {"teacher.source": f"cached:{out}"})

    def micro_batches(job: DistillationJob, samples: Any) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from job.batches(samples, Portion(epoch, 0, GLOBAL_BATCH, 0, 1))
            epoch += 1

    engines, batches, losses = {}, {}, {}
    for name, variant in runs.items():
        job = DistillationJob(DistillationJob(variant).settle(Sources()))
        samples = job.open_samples()
        job.build(bfloat16=False, node_size=1, persistence_threshold=0)
        engines[name] = zero_engine(job.run, job.make_task, "zero1", micro_batch_size=GLOBAL_BATCH)
        set_learning_rate(engines[name].deepspeed.optimizer, LEARNING_RATE)
        batches[name], losses[name] = micro_batches(job, samples), []

    def step(name: str) -> None:
        loss = forward_backward(engines[name], next(batches[name]), 0)
        engines[name].deepspeed.step()
        losses[name].append(loss.item())

    steps = {name: partial(step, name) for name in engines}
    seconds = seconds_in_turns(steps, rounds, warm_up=WARM_UP)
    counted = {
        name: step_flops(DistillationJob(variant), 1, checkpointing=False)
        for name, variant in runs.items()
        if name in ("live", "fp32")
    }
    share = counted["fp32"].model / counted["live"].model
    bytes_ = {p: sum(f.stat().st_size for f in (folder / p).iterdir()) for p in PRECISIONS}
    return {
        "seconds_of_a_step": {name: harness.spread(s) for name, s in seconds.items()},
        "share_of_flops_without_the_teacher": share,
        "from_cache_over_live": {
            p: harness.paired(seconds[p], seconds["live"]) for p in PRECISIONS
        },
        "steps": len(losses["live"]),
        "last_loss": {name: values[-1] for name, values in losses.items()},
        "largest_difference_of_losses": {
            p: max(abs(a - b) for a, b in zip(losses[p], losses["live"], strict=True))
            for p in PRECISIONS
        },
        "bytes": bytes_,
    }


def report(results: dict[str, Any]) -> None:
    """Prints the tables of both questions in Markdown."""
    precisions = ("fp32", "fp16", "fp8", "int8")
    print(f"\n| floor of smooth L1 (share) | {' | '.join(precisions)} |\n|{'---|' * 5}")
    for name, row in results["rounding"].items():
        cells = [
            f"{row['floor'][p]:.1e} ({100 * row['share_of_zero_prediction'][p]:.2g} %)"
            for p in precisions
        ]
        print(f"| {name}, {row['tokens']:,} x {row['width']} | {' | '.join(cells)} |")
    steps = results["step"]
    print(f"\n| a step from the cache | {' | '.join(precisions)} |\n|{'---|' * 5}")
    ratios = [steps["from_cache_over_live"][p] for p in precisions]
    cells = [f"{r['median']:.3f} ({r['quartiles'][0]:.3f}-{r['quartiles'][1]:.3f})" for r in ratios]
    print(f"| time over live | {' | '.join(cells)} |")
    off = [f"{steps['largest_difference_of_losses'][p]:.1e}" for p in precisions]
    print(f"| largest difference of a loss, {steps['steps']} steps | {' | '.join(off)} |")
    size = [f"{steps['bytes'][p] / 1e6:,.0f} MB" for p in precisions]
    print(f"| bytes | {' | '.join(size)} |")
    print(f"\nFLOPs without the teacher: {steps['share_of_flops_without_the_teacher']:.3f}")


def main() -> int:
    """Measures, prints the tables and writes the results."""
    arguments = parse()
    sys.path.insert(0, str(harness.ROOT))
    crops, rounds = (4, 2) if arguments.quick else (arguments.crops, arguments.rounds)
    rounded = rounding(arguments.models, arguments.images, crops)
    with tempfile.TemporaryDirectory() as folder:
        root = cut(arguments.images, Path(folder, "images"))
        step = side_by_side(root, Path(folder), rounds, quick=arguments.quick)
    results = {
        **harness.conditions(__file__, __doc__),
        "rounding": rounded,
        "step": step,
    }
    report(results)
    if not arguments.quick:
        harness.write(results, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
