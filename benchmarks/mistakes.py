"""How many seconds of processor time pass until a user's mistake is reported?

    python benchmarks/mistakes.py [--rounds 3] [--package FOLDER] [--out FILE]

It makes each of twenty mistakes with `python -m fd_large train`, each in a new process, and records
the exit code, the last line of the error, and the processor seconds (user and system) of the
process and its children. `--package` names another checkout, to compare two commits. Writes
benchmarks/results/mistakes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import harness

from fd_large.recipes import registry

PATIENCE = 120.0  # Seconds, so that a mistake that is accepted does not train to the end.


def mistakes(folder: Path) -> dict[str, list[str]]:
    """Returns {mistake: flags}, and writes the files that the flags name.

    Args:
        folder: An empty folder for these files.
    """
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("These are notes and no tar file.\n")
    (folder / "words.pth").write_text("These are notes and no weights.\n")
    (folder / "nothing.pth").touch()
    (folder / "mist.py").write_text("def run(projected, target):\n    return projected.sum()\n")
    (folder / "stored").mkdir()
    stored = registry.get("quickstart").with_fields({"runtime.seed": 1, "optim.max_steps": 2})
    (folder / "stored" / "recipe.json").write_text(json.dumps(stored.to_dict()))
    teacher = ["--teacher.model", "vit_base_patch16", "--teacher.source"]
    return {
        "number out of range": ["--optim.base_lr", "-1"],
        "no such folder of images": ["--data.root", "no/such/folder"],
        "name of a loss": ["--objective.loss", "smoth_l1"],
        "term of a sum of losses": ["--objective.loss", "0.9 cosin + 0.1 smooth_l1"],
        "name of a head": ["--objective.head", "liner"],
        "name of a normaliser": ["--objective.normaliser", "whitenning"],
        "name of an optimiser": ["--optim.name", "adamv"],
        "name of a tracker": ["--runtime.trackers", "tensorbord"],
        "name of a metric": ["--eval.best_metric", "held_out_los"],
        "heads of a detector": [
            *("--recipe", "coco_mask_rcnn_swinv2_base", "--data.root", str(folder)),
            *("--task.detection.heads", "mask_rcn"),
        ],
        "no data": ["--data.root", ""],
        "empty folder of images": ["--data.root", str(folder / "empty")],
        "file that is no tar": ["--data.root", str(folder / "text.txt")],
        "text file as a teacher": [*teacher, str(folder / "words.pth")],
        "empty file as a teacher": [*teacher, str(folder / "nothing.pth")],
        "no such model of timm": ["--teacher.source", "timm:vit_bsae_patch16_224"],
        "no such package of weights": ["--teacher.source", "package:no_such_package"],
        "loss without module:": ["--objective.loss", f"{folder}/mist.py:run"],
        "images without module:": ["--data.root", f"{folder}/mist.py:run"],
        "run with other settings": ["--runtime.seed", "2"],
    }


def flags_of(name: str, extra: list[str], folder: Path) -> list[str]:
    """Returns the command and all its flags for a mistake, without `python -m fd_large`.

    Args:
        name: The mistake.
        extra: The flags of the mistake.
        folder: Folder for the run's folder.
    """
    run = folder / ("stored" if name == "run with other settings" else "run")
    return [
        *("train", "--deepspeed_config", "zero1", "--runtime.run_dir", str(run)),
        *("--optim.max_steps", "2", *extra),
    ]


def measure(flags: list[str], package: Path) -> tuple[float, int, str]:
    """Returns processor seconds, exit code and last line on stderr of a command.

    Args:
        flags: The arguments after `python -m fd_large`.
        package: The checkout whose package is used.
    """
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    # The package stays compiled after a first start, as Python does it by itself.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["DS_ACCELERATOR"] = "cpu"
    before = os.times()
    process = subprocess.run(
        [sys.executable, "-m", "fd_large", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=package,
    )
    after = os.times()
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return seconds, process.returncode, lines[-1] if lines else ""


def main() -> int:
    """Measures all mistakes in rounds, prints and writes the results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--package", type=Path, default=harness.ROOT, help="a checkout")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "mistakes.json")
    arguments = parser.parse_args()
    results = harness.conditions(__file__, __doc__)
    seconds: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory(prefix="mistakes_") as name:
        folder = Path(name)
        cases = mistakes(folder)
        for _ in range(arguments.rounds):
            for mistake, extra in cases.items():
                flags = flags_of(mistake, extra, folder)
                spent, *answers[mistake] = measure(flags, arguments.package)
                seconds[mistake].append(spent)
    results["mistakes"] = {
        mistake: {
            "exit_code": answers[mistake][0],
            "seconds": [round(quantile(spent), 2) for quantile in (min, median, max)],
        }
        for mistake, spent in seconds.items()
    }
    for mistake, row in results["mistakes"].items():
        low, middle, high = row["seconds"]
        code = row["exit_code"]
        print(f"{mistake:28} {middle:6.2f} s ({low:.2f} to {high:.2f}), exit code {code}")
        print(f"    {answers[mistake][1][:150]}")
    harness.write(results, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
