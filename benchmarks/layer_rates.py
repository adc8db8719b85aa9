"""How much time of a step does layer decay cost in two parameter groups, and in one per layer?

    python benchmarks/layer_rates.py [--quick] [--ranks 2] [--stages 1 3]

A SwinV2 of 50 blocks runs in three engines per ZeRO stage, in turns: without layer decay, with this
package's layer decay in two parameter groups (engine/zero/layer_decay.py), and with a parameter
group per layer and kind of weight decay, as in the official fine-tuning code. The results are
ratios of times in the same round. Writes
benchmarks/results/layer_rates.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness

DECAY, RATE, WARM_UP = 0.9, 1e-4, 2
DEPTHS = (2, 2, 42, 4)  # SwinV2-G's.
WAYS = {
    "none": "no decay",
    "two groups": "decay inside two groups",
    "group per layer": "a group per layer",
}


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = harness.step_parser(__file__, __doc__, rounds=15)
    parser.add_argument("--width", type=int, default=96, help="channels of the first stage")
    return harness.parse(parser, quick={"rounds": 3, "width": 32})


def groups_by_layer(task: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Returns a parameter group for each layer and kind of weight decay.

    The entry `scale` of a group is the layer's factor of the learning rate.

    Args:
        task: The student with its loss.
        weight_decay: The weight decay of decayed parameters.
    """
    from fd_large.engine.zero.optimizer import parameter_groups

    names = {id(p): name for name, p in task.named_parameters()}
    groups: dict[tuple[float, str], dict[str, Any]] = {}
    for group in parameter_groups(task, weight_decay):
        for parameter in group["params"]:
            scale = task.layer_scale(names[id(parameter)], DECAY)
            new = {**group, "name": f"{group['name']} {scale}", "scale": scale, "params": []}
            groups.setdefault((scale, group["name"]), new)["params"].append(parameter)
    return list(groups.values())


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Builds all engines and times them in turns; rank 0 writes and prints the results."""
    from engines import job_of, noise, seconds_in_turns, zero_engine

    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero import engine, layer_decay, start
    from fd_large.engine.zero.optimizer import set_learning_rate
    from fd_large.ranks import distributed
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    distributed.start()
    start.start()
    world, size = distributed.world_size(), arguments.image_size
    run = registry.get("fd_swinv2_base")
    shape = Architecture(
        embed_dim=arguments.width,
        depths=DEPTHS,
        num_heads=tuple(arguments.width // 32 * 2**stage for stage in range(4)),
        window_size=size // 16,
    )
    small = replace(shape, depths=(1, 1, 1, 1))
    run = replace(
        run,
        student=replace(run.student, architecture=shape),
        teacher=replace(run.teacher, architecture=small, source="random", placement="replicated"),
        data=replace(run.data, image_size=size),
    )
    job = job_of(run)
    engines: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    for stage in arguments.stages:
        for way in WAYS:
            name = f"ZeRO-{stage}, {way}"
            patched = patch.object(engine, "parameter_groups", groups_by_layer)
            with patched if way == "group per layer" else nullcontext():
                engines[name] = zero_engine(
                    run, job.make_task, f"zero{stage}", micro_batch_size=arguments.micro_batch
                )
            if way == "two groups":
                rates[name] = layer_decay.by_layer(engines[name], DECAY)
    batch = noise(arguments.micro_batch, size)

    def step(name: str) -> None:
        engine = engines[name]
        set_learning_rate(engine.deepspeed.optimizer, RATE)
        for group in engine.deepspeed.optimizer.param_groups:
            group["lr"] = RATE * group.get("scale", 1.0)
        if name in rates:
            rates[name].at_scale = partial(float.__mul__, RATE)
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    steps = {name: partial(step, name) for name in engines}
    seconds = seconds_in_turns(steps, arguments.rounds, warm_up=WARM_UP)
    if distributed.is_main():
        ratios = {}
        for stage in arguments.stages:
            none, two, per_layer = (seconds[f"ZeRO-{stage}, {way}"] for way in WAYS)
            ratios[f"ZeRO-{stage}"] = {
                "two groups / none": harness.paired(two, none),
                "group per layer / none": harness.paired(per_layer, none),
                "group per layer / two groups": harness.paired(per_layer, two),
            }
        results = {
            **harness.conditions(__file__, __doc__),
            "ranks": world,
            "blocks": sum(DEPTHS),
            "trained_parameters": sum(job.tensor_sizes().trained),
            "image_size": size,
            "micro_batch": arguments.micro_batch,
            "groups": {n: len(e.deepspeed.optimizer.param_groups) for n, e in engines.items()},
            "seconds": {name: harness.spread(samples) for name, samples in seconds.items()},
            "ratios": ratios,
        }  # fmt: skip
        harness.write(results, arguments.out)
        draw(results, arguments.out.with_suffix(".png"))
        for stage_name, pairs in ratios.items():
            for pair, ratio in pairs.items():
                low, high = ratio["quartiles"]
                print(f"{stage_name}: {pair}: {ratio['median']:.3f} ({low:.3f}-{high:.3f})")
        print(f"written: {arguments.out}")
    return distributed.leave(0)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the seconds per step, with a bar for each kind of engine and ZeRO stage.

    Whiskers are quartiles.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(results["ratios"])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for place, (way, label) in enumerate(WAYS.items()):
        rows = [results["seconds"][f"{stage}, {way}"] for stage in stages]
        heights = [row["median"] for row in rows]
        around = [
            [row["median"] - row["quartiles"][0] for row in rows],
            [row["quartiles"][1] - row["median"] for row in rows],
        ]
        spots = [index + 0.27 * (place - 1) for index in range(len(stages))]
        colors = ("#bbbbbb", "#4477aa", "#ee9966")
        axes.bar(spots, heights, 0.25, yerr=around, capsize=3, label=label, color=colors[place])
        ratio = {"two groups": "two groups / none", "group per layer": "group per layer / none"}
        if way in ratio:
            for spot, height, stage in zip(spots, heights, stages, strict=True):
                text = f"x {results['ratios'][stage][ratio[way]]['median']:.3f}"
                axes.text(spot, height * 0.5, text, ha="center", color="white", size=9)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylabel("seconds per step")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.set_title(
        f"{results['blocks']} blocks, {results['trained_parameters'] / 1e6:.1f}M parameters, "
        f"{results['ranks']} ranks\n{results['machine']}",
        size=9,
    )
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
    harness.save(figure, path)


def main() -> int:
    """Starts the ranks, or runs as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    if arguments.as_rank:
        return run_as_rank(arguments)
    return harness.start(__file__, *sys.argv[1:], "--as-rank", ranks=arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
