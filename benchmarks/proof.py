"""Does a distilled student fine-tune better than its teacher, and than random weights?

    python benchmarks/proof.py [--quick] [--parts data teacher student finetune knn linear diagnose]

On the CIFAR-10 of FD_DATA (20,000 of the 50,000 training images, all 10,000 test images), on two
CPU cores: a small ViT with absolute positions learns the labels (the teacher); a ViT with shared
relative positions learns the teacher's map and no label (the student); teacher, student and the
student's model with random weights are then fine-tuned with the same budget, three seeds each, and
tested frozen by k-NN and a linear probe; `diagnose` compares what they attend to. Every part is a
command that a user has. It leaves its files in the work folder and is skipped if they are there, so
that an interrupted run goes on. Writes benchmarks/results/proof.json and plots.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import RESULTS, ROOT
from PIL import Image

PARTS = ("data", "teacher", "student", "finetune", "knn", "linear", "diagnose")
DATA = Path(os.environ.get("FD_DATA", ROOT.parent / "shared" / "data"))
ARCHIVES = {"train": "cifar10_train20k.tar", "test": "cifar10_test10k.tar"}

# Both models: 64 patches of 4 x 4 pixels, 4 blocks of 96 channels.
SHAPE = {"embed_dim": 96, "depths": 4, "num_heads": 3, "patch_size": 4}
QUICK_SHAPE = {"embed_dim": 48, "depths": 3, "num_heads": 3, "patch_size": 4}
IMAGE_SIZE, GLOBAL_BATCH = 32, 128


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, small models, one seed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--work", type=Path, default=None, help="folder of runs and images")
    parser.add_argument("--out", type=Path, default=RESULTS / "proof.json")
    return parser.parse_args()


class Proof:
    """The parts, each a command that works in the work folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        self.quick, self.ranks = quick, arguments.ranks
        self.work = arguments.work or ROOT / "runs" / ("proof_quick" if quick else "proof")
        self.images = {"train": 2000, "test": 1000} if quick else {"train": 20_000, "test": 10_000}
        self.shape = QUICK_SHAPE if quick else SHAPE
        self.teacher_epochs, self.student_epochs, self.finetune_epochs = (
            (4, 4, 2) if quick else (14, 12, 3)
        )
        self.seeds = 1 if quick else 3
        # A part that is skipped keeps the time that it took before.
        self.clock = self.work / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self.clock.read_text()) if self.clock.is_file() else {}
        )

    def run(self, part: str) -> None:
        """Runs a part, unless it is done."""
        if part in self.seconds:
            print(f"{part}: done before, {self.seconds[part]:.0f} s", flush=True)
            return
        print(f"{part} ...", flush=True)
        begin = time.monotonic()
        getattr(self, part)()
        self.seconds[part] = round(time.monotonic() - begin, 1)
        self.work.mkdir(parents=True, exist_ok=True)
        self.clock.write_text(json.dumps(self.seconds))
        print(f"{part}: {self.seconds[part]:.0f} s", flush=True)

    def data(self) -> None:
        """Writes class folders of PNG files; any prefix of the archives is class-balanced."""
        for split, archive in ARCHIVES.items():
            images, labels, classes = read_cifar(DATA / archive, self.images[split])
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = self.work / "cifar10" / split / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number:05d}.png")

    def teacher(self) -> None:
        """Trains a ViT with absolute positions on the labels, from random weights."""
        self._launch(
            "train",
            *("--recipe", "finetune_deit_vit_base"),
            *("--deepspeed_config", ROOT / "ds_configs" / "zero1.json"),
            *("--student.model", "deit_vit_base_patch16"),
            *_fields("student.architecture", {**self.shape, "image_size": IMAGE_SIZE}),
            *("--student.architecture.relative_position", "none"),
            *self._labelled(),
            *self._optim(self.teacher_epochs, base_lr=4e-3),
            *("--runtime.run_dir", self.work / "teacher"),
        )

    def student(self) -> None:
        """Distils the teacher into a ViT with shared relative positions, without labels."""
        self._launch(
            "train",
            *("--recipe", "fd_deit_vit_base"),
            *("--deepspeed_config", ROOT / "ds_configs" / "zero1.json"),
            *_fields("student.architecture", self.shape),
            *("--student.drop_path_rate", 0),
            *("--teacher.model", "auto", "--teacher.source", self.work / "teacher"),
            *("--data.root", self._root / "train", "--data.image_size", IMAGE_SIZE),
            *("--data.min_crop_scale", 0.35, "--data.workers", 0),
            *self._optim(self.student_epochs, base_lr=8e-3),
            *("--eval.knn_root", self._root),
            *("--runtime.run_dir", self.work / "student"),
        )

    def finetune(self) -> None:
        """Fine-tunes all three with the same budget, for every seed."""
        self._evaluate(
            "finetune",
            *("--seeds", self.seeds, "--recipe", "finetune_deit_vit_base"),
            *self._labelled(),
            *self._optim(self.finetune_epochs, base_lr=2e-3),
            *("--optim.layer_decay", 0.8),
        )

    def knn(self) -> None:
        """Tests the frozen models by k-NN."""
        self._evaluate("knn", "--data.root", self._root, "--data.workers", 0)

    def linear(self) -> None:
        """Trains a linear probe on the frozen models."""
        self._evaluate(
            "linear", "--seeds", self.seeds, "--data.root", self._root, "--data.workers", 0
        )

    def diagnose(self) -> None:
        """Compares attention, loss landscape and similarity of layers."""
        command = [sys.executable, "-m", "fd_large", "diagnose", *self._models[:2]]
        root, out = self._root / "test", self.work / "diagnosis"
        self._call([*command, "--data.root", root, "--out", out, "--images", 64])

    def results(self) -> dict[str, Any]:
        """Returns the results of the parts that are done."""
        found: dict[str, Any] = {}
        for task in ("finetune", "knn", "linear"):
            summary = self._read(self.work / task / "summary.json")
            if summary:
                found[task] = {
                    model["label"]: {
                        k: model[k] for k in ("mean", "standard_deviation", "accuracy")
                    }
                    for model in summary["nets"]
                }
        for run in ("teacher", "student"):
            summary = self._read(self.work / run / "summary.json")
            if summary:
                found[run] = {
                    key: summary[key]
                    for key in ("updates", "loss_start", "loss_end", "images_per_second")
                    + (("test_top1",) if run == "teacher" else ("test_knn",))
                }
        diagnosis = self._read(self.work / "diagnosis" / "diagnosis.json")
        if diagnosis:
            found["diagnosis"] = _scalars(diagnosis)
        return found

    def _read(self, path: Path) -> dict[str, Any]:
        """Returns a part's file, with paths relative to the work folder; empty if there is none."""
        if not path.is_file():
            return {}
        return json.loads(path.read_text().replace(f"{self.work}/", ""))

    @property
    def _root(self) -> Path:
        return self.work / "cifar10"

    @property
    def _models(self) -> list[str]:
        student = self.work / "student"
        return [str(self.work / "teacher"), str(student), f"{student}#scratch"]

    def _labelled(self) -> list[object]:
        """Flags of labelled training, with light augmentation, as suits a few epochs."""
        return [
            *("--data.root", self._root, "--data.image_size", IMAGE_SIZE),
            *("--data.min_crop_scale", 0.35, "--data.workers", 0),
            *("--task.finetune.randaugment", 0, "--task.finetune.erasing", 0),
            *("--task.finetune.mixup", 0, "--task.finetune.cutmix", 0),
            *("--student.drop_path_rate", 0, "--optim.layer_decay", 1),
        ]

    def _optim(self, epochs: int, *, base_lr: float) -> list[object]:
        share = GLOBAL_BATCH // self.ranks
        return [
            *("--optim.base_lr", base_lr, "--optim.warmup_lr", base_lr / 100),
            *("--optim.min_lr", base_lr / 100, "--optim.epochs", epochs),
            *("--optim.warmup_epochs", epochs / 10),
            *("--batch.global_batch_size", GLOBAL_BATCH, "--batch.micro_batch_size", share),
            *("--runtime.log_every", 50, "--runtime.keep_last", 1),
        ]

    def _evaluate(self, task: str, *flags: object) -> None:
        out = self.work / task
        self._launch("evaluate", *self._models, "--task", task, "--out", out, *flags)

    def _launch(self, *flags: object) -> None:
        """Starts the ranks, one core each, with DeepSpeed's launcher."""
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        ranks = ["--num_accelerators", self.ranks]
        self._call([launcher, *ranks, "--no_local_rank", "--module", "fd_large", *flags])

    def _call(self, command: list[object]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        command = [str(part) for part in command]
        with (self.work / "output.txt").open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=log, check=False, cwd=ROOT
            ).returncode
        if code:
            tail = (self.work / "output.txt").read_text().splitlines()[-25:]
            raise SystemExit("\n".join([*tail, f"ended with code {code}: {self.work}/output.txt"]))


def read_cifar(path: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns images (N, 32, 32, 3) uint8, labels and class names of an archive in FD_DATA."""
    with tarfile.open(path) as archive:
        strips = sorted(m.name for m in archive if m.name.endswith(".webp"))[: -(-count // 100)]
        pixels = [np.asarray(Image.open(archive.extractfile(name))) for name in strips]
        labels = np.load(io.BytesIO(archive.extractfile("labels.npy").read()))
        classes = json.loads(archive.extractfile("meta.json").read())["classes"]
    return np.concatenate(pixels).reshape(-1, 32, 32, 3)[:count], labels[:count], classes


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws a panel per task: dots are seeds, a line is their mean."""
    from matplotlib.figure import Figure

    tasks = [
        (task, title)
        for task, title in (
            ("finetune", "fine-tuned"),
            ("knn", "frozen: k-NN"),
            ("linear", "frozen: linear probe"),
        )
        if task in results["found"]
    ]
    if not tasks:
        return
    figure = Figure(figsize=(3.1 * len(tasks), 3.6), dpi=150, layout="constrained")
    colors = ("#5f5f5f", "#0072B2", "#D55E00")
    for axes, (task, title) in zip(np.ravel(figure.subplots(1, len(tasks))), tasks, strict=True):
        models = results["found"][task]
        for place, model in enumerate(models.values()):
            # No bars: the axis does not begin at 0.
            axes.plot(
                [place - 0.28, place + 0.28], [model["mean"]] * 2, color=colors[place], lw=2.5
            )
            axes.plot([place] * len(model["accuracy"]), model["accuracy"], "o", color=colors[place])
            axes.annotate(
                f"{model['mean']:.1f}",
                (place, max(model["accuracy"])),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=colors[place],
            )
        names = [label.replace("student: from scratch", "student,\nrandom") for label in models]
        axes.set_xticks(range(len(models)), names, size=9)
        values = [value for model in models.values() for value in model["accuracy"]]
        margin = max(1.0, 0.2 * (max(values) - min(values)))
        axes.set_ylim(max(0, min(values) - margin), max(values) + 2 * margin)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.set_title(title, size=10)
    figure.axes[0].set_ylabel("CIFAR-10 test accuracy, per cent")
    figure.suptitle(f"{results['images']['train']:,} training images; {results['machine']}", size=9)
    harness.save(figure, path)


def _fields(section: str, values: dict[str, int]) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{section}.{name}", value)]


def _scalars(value: Any) -> Any:
    """Returns a diagnosis without its long lists."""
    if isinstance(value, dict):
        return {key: _scalars(part) for key, part in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(part, dict) for part in value):
            return [_scalars(part) for part in value]
        return value if len(value) <= 16 and not any(isinstance(p, list) for p in value) else "..."
    return value


def main() -> int:
    """Runs the parts and writes the results after each."""
    arguments = parse()
    missing = [name for name in ARCHIVES.values() if not (DATA / name).is_file()]
    if missing:
        print(f"FD_DATA has no {', '.join(missing)}: {DATA}", file=sys.stderr)
        return 2
    proof = Proof(arguments)
    results: dict[str, Any] = {}
    for part in (part for part in PARTS if part in arguments.parts):
        proof.run(part)
        results = {
            **harness.conditions(__file__, __doc__),
            "quick": arguments.quick,
            "ranks": arguments.ranks,
            "images": proof.images,
            "nets": {**proof.shape, "image_size": IMAGE_SIZE},
            "epochs": {
                "teacher": proof.teacher_epochs,
                "student": proof.student_epochs,
                "finetune": proof.finetune_epochs,
            },
            "seconds": proof.seconds,
            "found": proof.results(),
        }
        results["command"] = results["command"].replace(str(proof.work), "FOLDER")
        harness.write(results, arguments.out)
    draw(results, arguments.out.with_suffix(".png"))
    print(json.dumps(results["found"], indent=1))
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
