"""Twenty pre-emptions of a Slurm job at random moments; the losses must not notice.

    python tests/soak/preemptions.py [--preemptions 20] [--seed 1]

Half by the signal that comes before a time limit, half by a job of higher priority; a quarter while
the ranks still start. Took 13 minutes on two busy cores; needs root and Slurm's packages (see
slurm_cluster.py). Writes benchmarks/results/preemptions.json and exits 1 if a loss differs in
one bit from the uninterrupted run's, a step was made twice, or the job ran once too often.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

from pictures import write_pictures  # noqa: E402
from slurm_cluster import Cluster, ended, missing  # noqa: E402
from slurm_run import Job, lines, start, updates_done  # noqa: E402
from twin import losses  # noqa: E402

UPDATES_EACH = 8
"""Steps of the run per pre-emption: enough that it does not end before the last of them."""
GRACE = 10
"""Seconds that a save has; from the fifth on a pre-empted job waits for their end."""
LONGEST_REST = 1.0  # seconds of training between the first step of a start and the pre-emption


def wait_until_started(cluster: Cluster, job: Job, restarts: int) -> None:
    """Waits until the job's next start runs its batch script's ranks."""
    cluster.wait(
        job.number,
        lambda s: (
            (s["JobState"], s["Restarts"]) == ("RUNNING", str(restarts))
            and job.said().count("the output of rank N is in") == restarts + 1
        ),
    )


def preempt(cluster: Cluster, job: Job, kind: str) -> None:
    """Takes the nodes away, or says that the time is up."""
    if kind == "time limit":
        cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
        return
    high = cluster.submit(
        *("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 0.5"),
    )
    cluster.wait(high, ended)


def interrupted(cluster: Cluster, job: Job, preemptions: int, seed: int) -> list[dict[str, Any]]:
    """Pre-empts the job at random moments; returns of each its kind, moment and what stood then."""
    draw = random.Random(seed)
    met = []
    for number in range(preemptions):
        kind = ("time limit", "higher priority")[number % 2]
        starting = number % 4 == draw.randrange(4) and (not met or not met[-1]["while starting"])
        wait_until_started(cluster, job, number)
        if starting:
            time.sleep(draw.uniform(0.0, 4.0))
        else:
            before = len(lines(job, "  step "))
            cluster.wait(job.number, lambda s, n=before: len(lines(job, "  step ")) > n)
            time.sleep(draw.uniform(0.0, LONGEST_REST))
        assert not ended(shown := cluster.show(job.number)), shown
        preempt(cluster, job, kind)
        cluster.wait(job.number, lambda s, n=number: int(s["Restarts"]) > n)
        met.append(
            {"kind": kind, "while starting": starting, "steps done": updates_done(job.run_dir)}
        )
        print(number + 1, met[-1], flush=True)
    return met


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if why := missing():
        print(f"{why}: apt-get install slurmctld slurmd slurm-client munge", file=sys.stderr)
        return 2
    updates = UPDATES_EACH * arguments.preemptions
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch) / "cluster", grace_seconds=GRACE) as cluster,
    ):
        folder = Path(scratch)
        write_pictures(folder / "pictures", 264)  # 33 steps an epoch
        calm = start(cluster, folder, "calm", updates=updates)
        shown = cluster.wait(calm.number, ended, 900)
        assert shown["JobState"] == "COMPLETED", calm.said()
        job = start(cluster, folder, "interrupted", updates=updates)
        met = interrupted(cluster, job, arguments.preemptions, arguments.seed)
        cluster.wait(job.number, ended, 900)
        # A requeue too many would have started by now.
        time.sleep(10)
        shown = cluster.show(job.number)
        results = {
            "command": " ".join(["python tests/soak/preemptions.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, two Slurm nodes on it",
            "pre-emptions": len(met),
            "before a time limit": sum(one["kind"] == "time limit" for one in met),
            "by a job of higher priority": sum(one["kind"] != "time limit" for one in met),
            "while the ranks started": sum(one["while starting"] for one in met),
            "requeued by the script": job.said().count("; requeued ("),
            "requeued by Slurm": job.said().count("Slurm requeues this one itself"),
            "of these after the end of the grace": job.said().count("waits for the end of the"),
            "starts": job.said().count("the output of rank N is in"),
            "end": f"{shown['JobState']}, exit code {shown['ExitCode'].split(':')[0]}",
            "updates": updates,
            "steps made twice": len(lines(job, "  step ")) - updates,
            "losses equal to the bit": losses(job.run_dir) == losses(calm.run_dir),
            "minutes": round((time.monotonic() - begin) / 60, 1),
        }
        (ROOT / "benchmarks/results/preemptions.json").write_text(
            json.dumps(results, indent=1) + "\n"
        )
        print(json.dumps(results, indent=1))
        good = (
            results["losses equal to the bit"]
            and results["steps made twice"] == 0
            and results["starts"] == len(met) + 1
            # PREEMPTED is what Slurm calls one that was, however it ended later.
            and results["end"] in ("COMPLETED, exit code 0", "PREEMPTED, exit code 0")
        )
        if not good:
            print(job.said()[-20000:], file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
