"""How long is the time from the command to the first step, and which parts take the most?

    python benchmarks/startup.py [--rounds 5] [--ranks 2] [--without mlflow] [--package CHECKOUT]
        [--launchers deepspeed fd_large] [FLAGS of train.py]

It starts the quick start, or the run of other flags, by DeepSpeed's launcher and by `python -m
fd_large --ranks`, in turns, and stops the run after its first step. Rank 0 records when it was
started, the parts of its work since then, and their processor seconds. The processor seconds (user
and system) of all processes until the first step are measured, too, since a busy machine changes
them less than wall time. Then the run is started once more. This restart ends the benchmark with an
error if it tries micro-batches or evaluates. --package measures another checkout in turns with this
one.

Forked ranks share what was imported before the fork. The wall time of these imports is in the first
part of a rank, but their processor seconds are only in the sum over all processes. If MLflow is
installed, as by the extras `test` and `mlflow`, DeepSpeed's launcher imports it in both of its
processes, and `--without mlflow` hides it. `train --help`, which needs no torch, is timed, too.
Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

BEGAN = time.time()  # The start of a rank; what came before is the launcher's.

TIMELINE, PACKAGE = "FD_BENCHMARK_TIMELINE", "FD_BENCHMARK_PACKAGE"
PATIENCE = 600.0  # Seconds until the first step.
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
# What a restart has no need of.
SPARED = ("trying micro batches", "evaluation")


def run_as_rank(timeline: Path) -> int:
    """Trains like train.py; rank 0 records each part of the start.

    Args:
        timeline: File for the times at which parts began, with the processor seconds until then.
    """
    sys.path[0] = os.environ[PACKAGE]
    from fd_large.cli.main import main
    from fd_large.ranks import activity

    noted = [(BEGAN, 0.0, "reading the arguments")]

    def note() -> None:
        if os.environ.get("RANK") != "0":
            return
        works = activity.current()
        part = ": ".join(work.what for work in works[1:3]) or "all else"
        if part != noted[-1][-1]:
            noted.append((time.time(), time.process_time(), part))
            timeline.write_text(json.dumps(noted))

    note()
    activity.on_change.append(note)  # Forked ranks have it too.
    return main(sys.argv[1:] if sys.argv[1] == "--ranks" else ["train", *sys.argv[1:]])


def command_of(launcher: str, ranks: int) -> list[Any]:
    """Returns the command that starts this file on ranks, without flags of train.py.

    Args:
        launcher: "deepspeed" or "fd_large".
        ranks: Number of ranks.
    """
    if launcher == "deepspeed":
        from fd_large.ranks.launch import free_port

        head = [BIN / "deepspeed", "--quiet", "--num_accelerators", ranks]
        return [*head, "--master_port", free_port(), __file__]
    return [sys.executable, __file__, "--ranks", ranks, "train"]


def measure(
    command: list[Any], flags: list[str], without: list[str], package: Path
) -> dict[str, float]:
    """Returns the seconds of each part of a start and of a restart, until their first steps.

    Args:
        command: Command that starts this file on ranks.
        flags: Flags of train.py.
        without: Packages that the processes cannot import.
        package: The checkout whose package is used.
    """
    folder = Path(tempfile.mkdtemp(prefix="startup_"))
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in without:
        (hidden / f"{name}.py").write_text("raise ImportError\n")
    try:
        parts = _start(command, flags, folder, package)
        _cut_to_first_step(folder / "run")
        again = _start(command, flags, folder, package, steps=2)
    finally:
        # The launcher's ranks may still write.
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
    if repeated := [part for part in again if any(part.endswith(spared) for spared in SPARED)]:
        raise SystemExit(f"a restart does what the start has done: {repeated}")
    totals = ("to the first step", "to the first step, processors of all")
    return parts | {f"restart {total}": again[total] for total in totals}


def _cut_to_first_step(run: Path) -> None:
    """Removes what the run in the folder `run` has stored about steps after the first.

    These are rows of metrics and checkpoints, so that a restart of the run makes the steps again.
    """
    rows = run / "metrics.jsonl"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if checkpoint.name != "step_00000001":
            shutil.rmtree(checkpoint)


def _start(
    command: list[Any], flags: list[str], folder: Path, package: Path, steps: int = 1
) -> dict[str, float]:
    """Starts a run, and kills it as soon as it has made and saved `steps` steps.

    Args:
        command: Command that starts this file on ranks.
        flags: Flags of train.py.
        folder: Folder for the run's folder and the output.
        package: The checkout whose package is used.
        steps: Number of steps of the run, including those of earlier starts.

    Returns: the seconds of each part until the last of these steps.
    """
    timeline, rows = folder / "timeline.json", folder / "run" / "metrics.jsonl"
    saved = folder / "run" / "checkpoints" / f"step_{steps:08d}"
    command = [
        *command,
        *("--deepspeed_config", package / "ds_configs" / "zero3.json"),
        *("--runtime.run_dir", folder / "run", "--runtime.log_every", 1),
        *("--runtime.save_every", 1, *flags),
    ]
    path = [str(folder / "hidden"), str(package), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, TIMELINE: str(timeline), PACKAGE: str(package)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    # The package stays compiled after a first start, as Python does it by itself.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    import psutil
    import torch

    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    began = time.time()
    with (folder / "output").open("w") as output:
        process = psutil.Popen(
            list(map(str, command)),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until(holds: Callable[[], bool]) -> None:
        while not holds():
            if process.poll() is not None or time.time() - began > PATIENCE:
                raise SystemExit((folder / "output").read_text()[-2000:])
            time.sleep(0.02)

    try:
        until(lambda: rows.exists() and rows.read_text().count("\n") >= steps)
        ended, spent = time.time(), processor_seconds(process)
        until(saved.is_dir)
        noted = json.loads(timeline.read_text())
    finally:
        processes = [*process.children(recursive=True), process] if process.is_running() else []
        for each in processes:
            with suppress(psutil.Error):
                each.kill()
        # A rank that is still dying may write.
        psutil.wait_procs(processes, timeout=10)
    noted = [entry for entry in noted if entry[0] < ended]
    parts: dict[str, float] = defaultdict(float)
    parts["launcher"] = noted[0][0] - began
    for (begin, _, part), (end, *_) in zip(noted, [*noted[1:], (ended,)], strict=True):
        parts[part] += max(0.0, end - begin)
    # The first step ends the last part: nobody noted its processor seconds.
    for (_, begin, part), (_, end, _) in itertools.pairwise(noted):
        parts[f"{part}, processor"] += end - begin
    parts["to the first step"] = ended - began
    parts["to the first step, processors of all"] = spent
    return dict(parts)


def processor_seconds(process: Any) -> float:
    """Returns the processor seconds (user and system) of a process and all its descendants."""
    seconds = 0.0
    for each in [process, *process.children(recursive=True)]:
        with suppress(Exception):  # It has just ended.
            times = each.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def help_seconds(package: Path) -> dict[str, float]:
    """Returns the wall seconds and the processor seconds of `train --help`.

    Args:
        package: The checkout whose package is used.
    """
    command = [sys.executable, "-m", "fd_large", "train", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    begin, before = time.time(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=package, env=environment)
    spent = sum(os.times()[2:4]) - sum(before[2:4])
    return {"--help": time.time() - begin, "--help, processor": spent}


def main() -> int:
    """Measures starts in rounds, prints and writes the results; returns the exit code."""
    import harness

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks, or GPUs")
    parser.add_argument("--launchers", nargs="+", default=["deepspeed", "fd_large"])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "startup.json")
    parser.add_argument("--without", nargs="+", default=[], help="packages to hide")
    parser.add_argument("--package", type=Path, help="another checkout, in turns with this one")
    arguments, flags = parser.parse_known_args()
    results = harness.conditions(__file__, __doc__)
    packages = {"": ROOT} | ({"other: ": arguments.package} if arguments.package else {})
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for (label, package), launcher in itertools.product(packages.items(), arguments.launchers):
            command = command_of(launcher, arguments.ranks)
            parts = measure(command, flags, arguments.without, package)
            for name, seconds in parts.items():
                samples[f"{label}{launcher}: {name}"].append(seconds)
            for name, seconds in help_seconds(package).items():
                samples[label + name].append(seconds)
    results["seconds"] = {name: harness.spread(values) for name, values in samples.items()}
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    for name, spread in results["seconds"].items():
        low, high = spread["quartiles"]
        print(f"{name:60} {spread['median']:6.2f} s  ({low:.2f} to {high:.2f})")
    harness.write(results, arguments.out)
    return 0


if __name__ == "__main__":
    if where := os.environ.get(TIMELINE):
        code = run_as_rank(Path(where))
        os._exit(code)
    raise SystemExit(main())
