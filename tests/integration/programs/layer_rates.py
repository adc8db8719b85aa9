"""Rank program: layer-wise rates and the average of the weights, against plain torch.

layer_rates.py FOLDER [STAGE ...] writes for each stage the largest distance of a final weight from
a plain AdamW with a group for every layer, and whether the average equals one of gathered weights.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from launch import write_result
from plain_steps import plain_adamw, plain_step
from scenarios import images_of, plain_task, schedule_of, start_engine, tiny_run
from whole_weights import whole_weights

from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.ema import Ema
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import start
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import parameter_groups
from fd_large.ranks import distributed
from fd_large.recipes.run import Run

UPDATES, DECAY, AVERAGE = 5, 0.6, 0.9
Weights = dict[str, torch.Tensor]


def plain(run: Run) -> Weights:
    """One process, a parameter group for each layer and decay: the official way."""
    task = plain_task(run)
    names = {id(p): name for name, p in task.named_parameters()}
    groups = [
        {"params": [p], "weight_decay": group["weight_decay"],
         "scale": task.layer_scale(names[id(p)], DECAY)}
        for group in parameter_groups(task, run.optim.weight_decay) for p in group["params"]
    ]  # fmt: skip
    assert len({group["scale"] for group in groups}) == sum(task.student.depths) + 2
    optimizer = plain_adamw(groups, run.optim)
    schedule = schedule_of(run)
    positions = torch.arange(run.batch.global_batch_size)
    for update in range(UPDATES):
        places = positions + update * len(positions)
        keep = drop_path_keep(task.drop_path_rates, run.runtime.seed, 0, places)
        loss, _ = task(**task.prepare(images_of(update, run), None, keep))
        plain_step(loss, task, optimizer, schedule, update, clip_norm=run.optim.clip_norm)
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def in_engine(run: Run, stage: int) -> tuple[Weights, dict[str, Any]]:
    """Final weights, and what became of the average."""
    engine, teacher = start_engine(run, {"stage": stage})
    engine.task.train()
    rates, ema = by_layer(engine, DECAY), Ema(engine, AVERAGE)
    assert rates is not None
    gathered = {name: value.clone() for name, value in whole_weights(engine.task)}
    schedule = schedule_of(run)
    world, rank = distributed.world_size(), distributed.rank()
    share, micro = run.batch.global_batch_size // world, run.batch.micro_batch_size
    for update in range(UPDATES):
        rates.at_scale = lambda scale, update=update: schedule.scaled_at(update, scale)
        images = images_of(update, run)
        for first in range(rank * share, (rank + 1) * share, micro):
            positions = torch.arange(first, first + micro)
            batch = Batch(images[positions], 0, positions + update * len(images), positions)
            forward_backward(engine, batch, run.runtime.seed)
            engine.deepspeed.step()
        ema.update()
        for name, value in whole_weights(engine.task):
            gathered[name].lerp_(value, 1 - AVERAGE)
    weights = dict(whole_weights(engine.task))
    with ema.in_place_of_weights():
        average = dict(whole_weights(engine.task))
    again = dict(whole_weights(engine.task))
    found = {
        "average": all(torch.equal(average[name], gathered[name]) for name in gathered),
        "differs": any(not torch.equal(average[name], weights[name]) for name in weights),
        "back": all(torch.equal(again[name], weights[name]) for name in weights),
        "groups": len(engine.deepspeed.optimizer.param_groups),
    }
    engine.deepspeed.destroy()
    del engine, teacher
    start.forget_engines()
    gc.collect()
    return weights, found


def main(folder: Path, stages: list[int]) -> None:
    distributed.start()
    start.start()
    run = tiny_run()
    expected = plain(run)
    results = {}
    for stage in stages:
        weights, found = in_engine(run, stage)
        scale = max(value.abs().max() for value in expected.values())
        error = max((weights[n] - value).abs().max() for n, value in expected.items())
        results[str(stage)] = {**found, "error": float(error / scale)}
    write_result(folder, results)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
