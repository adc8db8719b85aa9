"""How long does it take from `deepspeed fd_large/train.py` to the first step, and what takes it?

    python benchmarks/startup.py [--rounds 5] [--ranks 2] [--without mlflow] [FLAGS of train.py]

Starts the quick start, or the run of other flags, by DeepSpeed's launcher, and stops it after its
first step. A rank notes when it was started and what it was busy with since then; the processor
seconds of rank 0 stand beside. DeepSpeed's launcher imports MLflow in both of its processes where
that is installed, as the extras `test` and `mlflow` do: `--without mlflow` hides it. `fd-large
train --help`, which imports no torch, is timed too. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

BEGAN = time.time()  # The start of a rank; what came before is the launcher's.

TIMELINE = "FD_BENCHMARK_TIMELINE"
PATIENCE = 600.0  # Seconds until the first step.
BIN = Path(sys.executable).parent


def run_as_rank(timeline: Path) -> int:
    """Trains as train.py does; rank 0 notes what it does when."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from fd_large.cli.main import main
    from fd_large.ranks import activity

    noted = [(BEGAN, 0.0, "reading the arguments")]

    def note() -> None:
        works = activity.current()
        what = ": ".join(work.what for work in works[1:3]) or "all else"
        if what != noted[-1][-1]:
            noted.append((time.time(), time.process_time(), what))
            timeline.write_text(json.dumps(noted))

    if os.environ["RANK"] == "0":
        note()
        activity.on_change.append(note)
    return main(["train", *sys.argv[1:]])


def measure(ranks: int, flags: list[str], without: list[str]) -> dict[str, float]:
    """Starts a run and returns the seconds of each part until its first step, and of all.

    Args:
        ranks: Number of ranks.
        flags: Flags of train.py.
        without: Packages that are taken for not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix="startup_"))
    timeline, rows = folder / "timeline.json", folder / "run" / "metrics.jsonl"
    command = [
        *(BIN / "deepspeed", "--quiet", "--num_accelerators", ranks, __file__),
        *("--deepspeed_config", Path(__file__).parents[1] / "ds_configs" / "zero3.json"),
        *("--runtime.run_dir", folder / "run", "--runtime.log_every", 1, *flags),
    ]
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in without:
        (hidden / f"{name}.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, TIMELINE: str(timeline), "PYTHONPATH": path}
    # The package stays compiled after a first start, as Python does it by itself.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    import torch

    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    began = time.time()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None or time.time() - began > PATIENCE:
                raise SystemExit((folder / "output").read_text()[-2000:])
            time.sleep(0.02)
        ended = time.time()
        noted = json.loads(timeline.read_text())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The launcher's ranks may still write.
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
    parts: dict[str, float] = defaultdict(float)
    parts["launcher"] = noted[0][0] - began
    for (begin, _, what), (end, *_) in zip(noted, [*noted[1:], (ended,)], strict=True):
        parts[what] += max(0.0, end - begin)
    # The first step ends the last part: nobody noted its processor seconds.
    for (_, begin, what), (_, end, _) in itertools.pairwise(noted):
        parts[f"{what}, processor"] += end - begin
    return {**parts, "to the first step": ended - began}


def help_seconds() -> float:
    """Returns the seconds of `train --help`."""
    begin = time.time()
    command = [sys.executable, "-m", "fd_large", "train", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    return time.time() - begin


def main() -> int:
    """Measures in rounds, prints and writes."""
    import harness

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks, or GPUs")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "startup.json")
    parser.add_argument("--without", nargs="+", default=[], help="packages to hide")
    arguments, flags = parser.parse_known_args()
    results = harness.conditions(__file__, __doc__)
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name, seconds in measure(arguments.ranks, flags, arguments.without).items():
            samples[name].append(seconds)
        samples["--help"].append(help_seconds())
    results["seconds"] = {name: harness.spread(values) for name, values in samples.items()}
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    for name, found in results["seconds"].items():
        low, high = found["quartiles"]
        print(f"{name:36} {found['median']:6.2f} s  ({low:.2f} to {high:.2f})")
    harness.write(results, arguments.out)
    return 0


if __name__ == "__main__":
    if where := os.environ.get(TIMELINE):
        code = run_as_rank(Path(where))
        os._exit(code)
    raise SystemExit(main())
