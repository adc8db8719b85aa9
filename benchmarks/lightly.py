"""How do fd_large and lightly-train compare in distilling a ResNet-18 into a ResNet-18?

    python benchmarks/lightly.py --python VENV/bin/python [--data FOLDER] [--rounds 3]

VENV has lightly-train and timm; FOLDER has the CIFAR-10 archives of FD_DATA, or is the official
archive. Both packages distil the same teacher, which this benchmark trains on the labels. They use
the same images of 64 pixels with crops and flips only, for 390 steps of 128 images, on one CPU core
and thread. All other settings are the defaults of each package. Then fd_large's `evaluate` measures
all students by k-NN. Speed is by wall clock between the fifth and the last step, in turns, so that
nothing else should run on the machine. Results in --work are not computed again. Writes
benchmarks/results/lightly.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from claim_images import CLASSES, Images, read
from PIL import Image

IMAGES, STEPS, BATCH, SIZE = 16_640, 390, 128, 64
WARM, TIMED = 5, 35
LIGHT = """
import sys, lightly_train
seed, out, data, teacher, epochs = sys.argv[1:]
lightly_train.pretrain(
    out=out, data=data, model="timm/resnet18", method="distillation",
    method_args={"teacher": "timm/resnet18", "teacher_weights": teacher},
    epochs=int(epochs), batch_size=128, num_workers=0, seed=int(seed), accelerator="cpu",
    precision="32-true", transform_args={
        "image_size": (64, 64), "random_resize": {"min_scale": 0.35}, "color_jitter": None,
        "random_gray_scale": None, "gaussian_blur": None,
    },
)
"""


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the environment with lightly-train")
    parser.add_argument("--data", type=Path, default=os.environ.get("FD_DATA"))
    parser.add_argument("--work", type=Path, default=Path("lightly_work"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "lightly.json")
    return parser.parse_args()


def write_images(data: Path, work: Path) -> None:
    """Writes train/ and val/ with class folders, and unlabelled/ and few/ without class folders.

    unlabelled/ has the first images of train/, and few/ the first of these, as many as the timed
    steps need.

    Args:
        data: The archives of CIFAR-10.
        work: The folder to write to.
    """
    for name, images in zip(("train", "val"), read(data), strict=True):
        _write(images, work / name)
    files = sorted((work / "train").glob("*/*.png"), key=lambda path: path.name)
    for name, count in (("unlabelled", IMAGES), ("few", TIMED * BATCH)):
        (work / name).mkdir(exist_ok=True)
        for file in files[:count]:
            os.link(file, work / name / file.name)


def _write(images: Images, folder: Path) -> None:
    for number, (pixels, label) in enumerate(zip(*images, strict=True)):
        path = folder / CLASSES[label] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def train_teacher(work: Path) -> None:
    """Trains timm's ResNet-18 on the labels of train/ at 64 pixels for four epochs, in plain torch.

    The weights are written to teacher.safetensors, and to teacher_light.pt for lightly-train, which
    accepts only a classifier of 1,000 classes: there the classifier is replaced by zeros of that
    shape. A student learns the features before the classifier.

    Args:
        work: Folder of the images and of the files to write.
    """
    import timm
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional

    torch.manual_seed(0)
    torch.set_num_threads(1)
    files = sorted((work / "train").glob("*/*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    mean, std = (torch.tensor(each) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    net = timm.create_model("resnet18", num_classes=len(CLASSES)).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    epochs, batch = 4, 100
    steps = epochs * len(files) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    for _ in range(epochs):
        for places in torch.randperm(len(files)).split(batch):
            images = ((pixels[places] / 255 - mean) / std).permute(0, 3, 1, 2)
            images = functional.pad(images.flip(3) if torch.rand(()) < 0.5 else images, (4,) * 4)
            top, left = torch.randint(0, 9, (2,)).tolist()
            images = images[:, :, top : top + 32, left : left + 32]
            images = functional.interpolate(images, size=SIZE, mode="bilinear")
            loss = functional.cross_entropy(net(images), labels[places], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    state = {name: values.contiguous() for name, values in net.state_dict().items()}
    save_file(state, work / "teacher.safetensors")
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, work / "teacher_light.pt")


def command(name: str, seed: int, steps: int, settings: argparse.Namespace) -> list[str]:
    """Returns the command that trains a contender, in the folder --work/NAME_SEED.

    Args:
        name: "ours" or "light".
        seed: The seed.
        steps: Number of steps; for another number than `STEPS`, the run is a timed one.
        settings: The flags.
    """
    work = settings.work
    data = work / ("unlabelled" if steps == STEPS else "few")
    out = work / f"{name}_{seed}" if steps == STEPS else work / f"timed_{name}"
    if name == "light":
        epochs = steps * BATCH // (IMAGES if steps == STEPS else TIMED * BATCH)
        words = (seed, out, data, work / "teacher_light.pt", epochs)
        return [settings.python, "-c", LIGHT, *map(str, words)]
    words = ("--runtime.seed", seed, "--runtime.run_dir", out, "--optim.max_steps", steps)
    if steps != STEPS:
        # Timed are steps: the evaluations between them are counted out.
        words += ("--eval.every", 0, "--runtime.save_every", 0, "--runtime.log_every", WARM)
    return [
        *(sys.executable, "-m", "fd_large", "train", "--deepspeed_config", "zero1"),
        *("--recipe", "small_data", "--student.model", "timm:resnet18"),
        *("--teacher.model", "timm:resnet18", "--teacher.source", f"{work}/teacher.safetensors"),
        *("--data.root", str(data), "--data.image_size", str(SIZE)),
        *("--batch.global_batch_size", str(BATCH), *map(str, words)),
    ]


def environment() -> dict[str, str]:
    """Returns the environment variables of a process with one thread."""
    return {
        **os.environ,
        "PYTHONPATH": str(harness.ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def timed(name: str, settings: argparse.Namespace) -> dict[str, float]:
    """Runs `TIMED` steps of a contender in a new process.

    Args:
        name: "ours" or "light".
        settings: The flags.

    Returns: `to_step_5`, the seconds from the launch to the fifth step; `images_per_second` from
        there to the last step; and `gib`, the peak memory of the process in GiB.
    """
    shutil.rmtree(settings.work / f"timed_{name}", ignore_errors=True)
    begin, at, text = time.perf_counter(), {}, ""
    process = subprocess.Popen(
        command(name, 0, TIMED, settings), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
    )  # fmt: skip
    assert process.stdout is not None
    while part := process.stdout.read(4096):
        text += part.decode(errors="replace")
        for step in re.findall(rf"\b(\d+)/{TIMED} ", text):
            at.setdefault(int(step), time.perf_counter() - begin)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(text)
    rate = (TIMED - WARM) * BATCH / (at[TIMED] - at[WARM])
    return {"to_step_5": at[WARM], "images_per_second": rate, "gib": usage.ru_maxrss / 2**20}


def accuracies(settings: argparse.Namespace) -> dict[str, list[float]]:
    """Trains missing students, and returns the k-NN accuracies of each contender, one per seed.

    The teacher and a random ResNet-18 are measured, too.
    """
    models: dict[str, list[str]] = {}
    for name in ("ours", "light"):
        models[name] = []
        for seed in range(settings.seeds):
            folder = settings.work / f"{name}_{seed}"
            exported = folder / "exported_models/exported_last.pt"
            if not (folder / "summary.json").exists() and not exported.exists():
                subprocess.run(command(name, seed, STEPS, settings), env=environment(), check=True)
            models[name].append(str(folder) if name == "ours" else f"timm:resnet18={exported}")
    models["teacher"] = [f"timm:resnet18={settings.work}/teacher.safetensors"]
    models["random"] = ["timm:resnet18=random"]
    words = [model for each in models.values() for model in each]
    words += ["--task", "knn", "--data.root", str(settings.work), "--data.image_size", str(SIZE)]
    out = settings.work / "knn"
    words = [sys.executable, "-m", "fd_large", "evaluate", *words, "--out", str(out)]
    if not (out / "summary.json").exists():
        subprocess.run(words, env=environment(), check=True)
    rows = json.loads((out / "summary.json").read_text())["nets"]
    figures = iter([row["mean"] for row in rows])
    return {name: [next(figures) for _ in each] for name, each in models.items()}


def main() -> int:
    """Trains missing models, measures and writes the results; returns the exit code."""
    settings = parse()
    settings.work.mkdir(exist_ok=True)
    if not (settings.work / "few").exists():
        write_images(Path(settings.data), settings.work)
    if not (settings.work / "teacher_light.pt").exists():
        train_teacher(settings.work)
    results: dict[str, Any] = harness.conditions(__file__, __doc__, ("torch", "timm"))
    results["knn"] = accuracies(settings)
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "light": []}
    for turn in harness.turns(list(rows), settings.rounds):
        for name in turn:
            rows[name].append(timed(name, settings))
    for name, each in rows.items():
        results[name] = {key: harness.spread([row[key] for row in each]) for key in each[0]}
    ratio = [[row["images_per_second"] for row in rows[name]] for name in rows]
    results["ours_over_light"] = harness.paired(*ratio)
    for name in rows:
        folder = settings.work / f"{name}_0"
        results[name]["files"] = sum(path.is_file() for path in folder.rglob("*"))
    harness.write(results, settings.out)
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
