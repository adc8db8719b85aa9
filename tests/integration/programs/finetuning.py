"""Rank program: fine-tuning in the engine against plain torch with a group for each layer.

finetuning.py FOLDER RUN..., each RUN a recipe (FOLDER/RUN.json), writes for each the losses of ten
steps, how far its final weights are from the plain ones and those from the first, and what a
test says, of all ranks and of one process alone.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from launch import write_result
from plain_steps import plain_adamw, plain_step
from whole_weights import whole_weights

from fd_large.backbones.statistics import normalise
from fd_large.data.centre_crops import central_batches
from fd_large.data.random_numbers import drop_path_keep
from fd_large.data.sampler import Portion
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.find_model import find_model
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.opening import engine_of
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import parameter_groups, set_learning_rate
from fd_large.engine.zero.partition import load_weights
from fd_large.probes import knn
from fd_large.probes.features import extract, pooled
from fd_large.ranks import distributed
from fd_large.recipes.run import Run
from fd_large.tasks.classification.job import FineTuningJob
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.classification.task import FineTuning
from fd_large.tasks.jobs import job_of

UPDATES, TEST_BATCH = 10, 4
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}


def schedule_of(run: Run) -> CosineSchedule:
    return CosineSchedule(*run.optim.rates(run.batch.global_batch_size), UPDATES, 2)


def job_from(run: Run) -> FineTuningJob:
    job = FineTuningJob(run)
    job.weights = sources_of(job_of)  # A distilled run may be where the student starts.
    return job


def initial_task(job: FineTuningJob) -> FineTuning:
    torch.manual_seed(job.run.runtime.seed)
    task = job.make_task()
    load_weights(task.student, job.initial_weights()["student"], where="test")
    return task


def plain(run: Run) -> tuple[dict[str, torch.Tensor], list[float]]:
    """One process, whole batches, one group for each layer and decay: the official way."""
    job = job_from(run)
    task = initial_task(job)
    names = {id(p): name for name, p in task.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for group in parameter_groups(task, run.optim.weight_decay):
        for parameter in group["params"]:
            scale = task.layer_scale(names[id(parameter)], run.optim.layer_decay)
            key = (scale, group["weight_decay"])
            groups.setdefault(key, {"params": [], "scale": scale, "weight_decay": key[1]})
            groups[key]["params"].append(parameter)
    assert len({group["scale"] for group in groups.values()}) == sum(task.student.depths) + 2
    optimizer = plain_adamw(groups.values(), run.optim)
    samples, schedule, losses = job.open_samples(), schedule_of(run), []
    batches = job.batches(samples, Portion(0, 0, run.batch.global_batch_size, 0, 1))
    for update in range(UPDATES):
        batch = next(batches)
        keep = drop_path_keep(task.drop_path_rates, run.runtime.seed, 0, batch.positions)
        loss, _ = task(**task.prepare(batch.images, batch.targets, keep))
        plain_step(loss, task, optimizer, schedule, update, clip_norm=run.optim.clip_norm)
        losses.append(loss.item())
    return {name: p.detach().clone() for name, p in task.named_parameters()}, losses


def tested_alone(run: Run, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """The same test in one process, of the same weights."""
    job = job_from(run)
    task = job.make_task()
    task.load_state_dict(weights)
    task.eval()
    totals: dict[str, torch.Tensor] = {}
    for batch in central_batches(
        job.test_images(), image_size=run.data.image_size, batch_size=TEST_BATCH, rank=0,
        world_size=1, workers=0, max_pixels=run.data.max_pixels,
    ):  # fmt: skip
        with torch.no_grad():
            _, sums = task(**task.prepare(batch.images, batch.labels, None))
        sums.pop("predicted")  # A number for each image, and no sum.
        totals = {key: totals.get(key, 0) + value for key, value in sums.items()}
    return {f"test_{name}": value for name, value in averaged(totals).items()}


def in_engine(run: Run) -> tuple[dict[str, torch.Tensor], list[float], dict[str, float]]:
    """The same on these ranks under ZeRO-3, with the test accuracy at the end."""
    world, rank = distributed.world_size(), distributed.rank()
    job, micro = job_from(run), run.batch.micro_batch_size
    job.check()
    numbers = ds.RunNumbers(
        micro_batch_size=micro,
        accumulation=run.batch.global_batch_size // world // micro,
        world_size=world,
        node_size=ds.ranks_of_a_node(run.engine.node_size, world),
        clip_norm=run.optim.clip_norm,
        bfloat16=False,
        parameter_sizes=job.tensor_sizes().trained,
    )
    config = ds.fill({"zero_optimization": ZERO3}, numbers)
    engine = engine_of(run, job.make_task, config, initial=job.initial_weights())
    engine.task.train()
    rates, schedule, losses = by_layer(engine, run.optim.layer_decay), schedule_of(run), []
    samples = job.open_samples()
    batches = job.batches(samples, Portion(0, 0, micro, rank, world))
    for update in range(UPDATES):
        set_learning_rate(engine.deepspeed.optimizer, schedule.at_step(update))
        rates.at_scale = lambda scale, update=update: schedule.scaled_at(update, scale)
        total = torch.zeros(())
        for _ in range(numbers.accumulation):
            total += forward_backward(engine, next(batches), run.runtime.seed)
            engine.deepspeed.step()
        mean = distributed.sum_tensor(total / numbers.accumulation) / distributed.world_size()
        losses.append(mean.item())
    (evaluation,) = job.evaluations(engine, samples, TEST_BATCH)
    metrics, _ = evaluation.measure(UPDATES, True, lambda: None)
    weights = dict(whole_weights(engine.task))
    engine.deepspeed.destroy()
    del engine
    start.forget_engines()
    gc.collect()
    return weights, losses, metrics


def neighbours(run: Run, folder: Path) -> dict[str, Any]:
    """Features and neighbours of what is fine-tuned: of all ranks, and of one process alone."""
    named = find_model(run.student.init, job_of)
    net, statistics = named.build()
    job, features = job_from(run), {}
    parts = {"train": job.open_samples(), "test": job.test_images()}
    same = True
    for name, pictures in parts.items():
        settings = {"image_size": named.image_size, "batch_size": TEST_BATCH}
        (features[name],) = extract(net, statistics, pictures, folder / name, **settings)
        for batch in central_batches(
            pictures, **settings, rank=0, world_size=1, workers=0, max_pixels=2**20
        ):
            with torch.no_grad():
                rows = pooled(net(normalise(batch.images, statistics)), "mean").numpy()
            where = slice(batch.start, batch.start + len(rows))
            same &= (features[name].rows[where] == rows).all()
            same &= (features[name].labels[where] == batch.labels.numpy()).all()
    predicted = knn.classify(features["train"], features["test"], num_classes=3, k=5)
    percent = features["test"].percent(predicted)
    bank, test = knn.Bank(features["train"], 3), features["test"]
    found = knn.predict(torch.from_numpy(test.rows), bank, k=5, temperature=0.07)
    alone = 100 * int((found.numpy() == test.labels).sum()) / len(test.labels)
    return {"same_rows": bool(same), "ranks": percent, "alone": alone}


def main(folder: Path, names: list[str]) -> None:
    distributed.start()
    start.start()
    # Two images a block of neighbours, so that 19 are an uneven number of blocks.
    knn.QUERY_BLOCK = 2
    results = {}
    for name in names:
        run = Run.from_dict(json.loads((folder / f"{name}.json").read_text()))
        run = job_of(run).settle(sources_of(job_of))
        expected, plain_losses = plain(run)
        weights, losses, metrics = in_engine(run)
        assert weights.keys() == expected.keys()
        scale = max(value.abs().max() for value in expected.values())
        error = max((weights[n] - value).abs().max() for n, value in expected.items())
        first = dict(initial_task(job_from(run)).named_parameters())
        still = [n for n, value in weights.items() if (value - first[n]).abs().max() < 1e-5]
        results[name] = {
            "plain": plain_losses,
            "losses": losses,
            "error": float(error / scale),
            "still": still,
            "metrics": metrics,
            "alone": tested_alone(run, weights),
            "neighbours": neighbours(run, folder / "features" / name),
        }
    write_result(folder, results)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
