"""The folder of a run, made up."""

import json

import numpy
import pytest

from fd_large.recipes import registry


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's folder; `updates` rows, held-out numbers and pictures if asked for."""

    def make(
        name="runs/made_up", *, updates=60, held_out=True, features=("before", "after"), **more
    ):
        folder = tmp_path / name
        (folder / "pictures").mkdir(parents=True)
        (folder / "events").mkdir()
        recipe = registry.get("fd_swinv2_base").to_dict()
        recipe["teacher"]["source"] = more.get("source", "teacher.pth")
        recipe["data"]["root"] = more.get("root", "builtin:photographs")
        write(folder / "recipe.json", recipe)
        command = ["/home/u/fd_large/train.py", "--local_rank=0", "--deepspeed_config", "z.json"]
        environment = {"world_size": 2, "device": "cpu", "command": command + more.get("words", [])}
        environment["metrics"] = {
            "loss": "smooth L1 loss",
            "held_out/loss": "held-out loss",
            "held_out/cosine": "held-out cosine",
            "unseen_crops/loss": "unseen-crops loss",
        }
        write(folder / "environment.json", environment)
        summary = {
            "status": more.get("status", "done"),
            "total_updates": 60,
            "world_size": 2,
            "device": "cpu",
            "images_per_second": 84.25,
            "peak_memory_bytes": 1_234_000_000,
        }
        if summary["status"]:
            write(folder / "summary.json", summary)
        with (folder / "metrics.jsonl").open("w") as file:
            for i in range(updates):
                row = {"update": i, "loss": 0.5 - i / 300, "learning_rate": 1e-3}
                file.write(json.dumps(row) + "\n")
        if held_out:
            lines = [
                {"update": 0, "held_out_loss": 0.5, "held_out_cosine": -0.001},
                {"update": 60, "held_out_loss": 0.332, "held_out_cosine": 0.43}
                | {"held_out_best_constant": 0.4, "unseen_crops_loss": 0.2},
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "evaluations.jsonl").write_text(text)
        for when in features:
            write_panel(folder / "pictures" / f"features_{when}.npz", when)
        return folder

    return make


def write(path, value):
    path.write_text(json.dumps(value))


def write_panel(path, when):
    generator = numpy.random.default_rng(0)
    images = generator.integers(0, 256, (2, 48, 48, 3), dtype=numpy.uint8)
    teacher = generator.normal(size=(2, 12, 12, 7)).astype(numpy.float32)
    student = teacher * 0.5 if when == "after" else generator.normal(size=teacher.shape) * 0.1
    update = 60 if when == "after" else 0
    numpy.savez(path, images=images, teacher=teacher, student=student, update=update)
