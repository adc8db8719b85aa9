"""Fine-tuning on ranks: the weights of one plain process, and accuracy of any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import distance
from labelled_folder import labelled_folder, noise
from launch import read_results, run_ranks
from PIL import Image
from stored_run import store_tensors
from twin import train

from fd_large.backbones.registry import build
from fd_large.data.labelled import open_split
from fd_large.engine.find_model import find_model
from fd_large.probes import knn
from fd_large.probes.features import extract
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.jobs import job_of

PROGRAM = Path(__file__).parent / "programs" / "finetuning.py"
SIZE = 32
NETS = {
    "vit": (
        "finetune_clip_vit_base",
        {"embed_dim": 24, "depths": (3,), "num_heads": (2,), "patch_size": 8},
        {"relative_position": "shared"},
        {"relative_position": "block"},
    ),
    "swin": (
        "finetune_esvit_swin_base",
        {
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 4,
            "patch_size": 4,
        },
        {"shared_position_bias": True},
        {"shared_position_bias": False},
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 images to train on and 19 for tests, an uneven number of batches of four."""

    def pixels(generator: np.random.Generator, label: int) -> np.ndarray:
        coarse = noise(generator, 6, 6)
        coarse[..., label] //= 3
        return np.asarray(Image.fromarray(coarse).resize((36, 36)))

    root = tmp_path_factory.mktemp("labelled")
    return labelled_folder(root, train=110, val=19, classes=3, pixels=pixels)


def distilled(folder: Path, fine: Run, shape: dict, shared: dict) -> None:
    """A run whose student's blocks share their position bias."""
    run = registry.get(fine.name.replace("finetune", "fd"))
    architecture = Architecture(**shape, **shared)
    run = replace(
        run,
        student=replace(run.student, architecture=architecture),
        data=replace(run.data, image_size=SIZE),
    )
    net = build(run.student.model, replace(architecture, image_size=SIZE), seed=1)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"student.{name}": tensor.detach() + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in net.named_parameters()
    }
    tensors |= {"projection.weight": torch.zeros(2, net.width), "projection.bias": torch.zeros(2)}
    store_tensors(folder, tensors, ranks=2, recipe=run.to_dict())


def fine_tuning(name: str, recipe: str, pictures: Path, folder: Path) -> Run:
    _, shape, shared, own = NETS[name]
    run = registry.get(recipe)
    distilled(folder / "distilled" / name, run, shape, shared)
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    return replace(
        run,
        student=replace(
            run.student,
            architecture=Architecture(**shape, **own),
            init=str(folder / "distilled" / name),
            drop_path_rate=0.3,
        ),
        data=replace(run.data, root=str(pictures), image_size=SIZE, workers=0),
        optim=replace(run.optim, base_lr=5e-2, warmup_lr=1e-3, min_lr=1e-4, clip_norm=0.5),
        batch=replace(run.batch, global_batch_size=8, micro_batch_size=2),
        runtime=replace(run.runtime, run_dir=str(run_dir)),
    )


@pytest.mark.closeness
def test_ten_mixed_updates_are_those_of_one_plain_process(pictures: Path, tmp_path: Path) -> None:
    for name, (recipe, *_) in NETS.items():
        run = fine_tuning(name, recipe, pictures, tmp_path)
        assert (run.task.finetune.mixup, run.task.finetune.cutmix) == (0.8, 1.0)
        (tmp_path / f"{name}.json").write_text(json.dumps(run.to_dict()))
    run_ranks(PROGRAM, tmp_path, *NETS, ranks=2, results=tmp_path, timeout=240)
    for found in read_results(tmp_path, 2):
        for name in NETS:
            result = found[name]
            assert result["error"] < 1e-5, (name, result["error"])
            assert distance(result["losses"], result["plain"]) <= 1e-6, name
            # A tensor that never moves would agree with anything.
            assert result["still"] == [], name
            # 19 images in batches of four, on two ranks as in one process.
            ours, alone = result["metrics"], result["alone"]
            assert ours["test_top1"] == alone["test_top1"]
            assert ours["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-6)
            neighbours = result["neighbours"]
            assert neighbours["same_rows"], f"{name}: features to the bit"
            assert neighbours["ranks"] == neighbours["alone"]


def test_a_student_is_tested_by_its_neighbours_as_it_trains(pictures: Path, tmp_path: Path) -> None:
    """On two ranks that split student and teacher; as `evaluate` then finds it.

    The best checkpoint stays; and the run goes on to more steps until it gets no better.
    """
    words = ("--eval.knn_root", str(pictures), "--eval.knn_every", "2", "--optim.max_steps", "5")
    held_out = ("--eval.root", str(pictures / "val"), "--eval.every", "3", "--eval.views", "5")
    placed = ("--teacher.placement", "sharded")
    kept = ("--eval.best_metric", "test_knn", "--runtime.keep_last", "1")
    words = (*words, *held_out, *placed, *kept, "--runtime.save_every", "99")
    train(pictures / "train", tmp_path / "run", *words, timeout=240)
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    rows = {row["update"]: row for row in map(json.loads, lines)}
    asked = [update for update, row in rows.items() if "test_knn" in row]
    assert asked == [0, 2, 4, 5]
    assert [update for update, row in rows.items() if "held_out_loss" in row] == [0, 3, 5]
    assert not (tmp_path / "run" / "features").exists()

    named = find_model(str(tmp_path / "run"), job_of)
    net, statistics = named.build()
    features = {}
    for part in ("train", "val"):
        (features[part],) = extract(
            net,
            statistics,
            open_split(str(pictures), part),
            tmp_path / part,
            image_size=named.image_size,
            batch_size=2,
        )
    predicted = knn.classify(features["train"], features["val"], num_classes=3)
    percent = features["val"].percent(predicted)
    assert rows[5]["test_knn"] == pytest.approx(percent)
    assert best_step(rows) == stored_best(tmp_path / "run")

    more = ("--optim.max_steps", "40", "--eval.patience", "3")
    train(pictures / "train", tmp_path / "run", *words, *more, timeout=240)
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    rows = {row["update"]: row for row in map(json.loads, lines)}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The first step after which three evaluations in a row were no better than the best.
    steps = [step for step, row in rows.items() if step and "test_knn" in row]
    ends = [
        step
        for number, step in enumerate(steps)
        if step > 5 and steps.index(best_step(rows, until=step)) == number - 3
    ]
    assert (summary["status"], summary["updates"]) == ("done", (ends or [40])[0])
    assert best_step(rows) == stored_best(tmp_path / "run") == summary["best"]["update"]


def best_step(rows: dict[int, dict[str, float]], until: int = 99) -> int:
    """The first step of the highest accuracy after training has begun."""
    found = {s: row["test_knn"] for s, row in rows.items() if 0 < s <= until and "test_knn" in row}
    return max(found, key=lambda step: (found[step], -step))


def stored_best(folder: Path) -> int:
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    best = (folder / "checkpoints" / "best").resolve()
    assert set(names) == {"best", best.name, names[-1]}, "the best and the newest stay"
    return int(best.name.removeprefix("step_"))
