"""Second starts, Ctrl-C and closed terminals at random moments; the losses must not notice.

    python tests/soak/owners.py [--doubles 20] [--interrupts 20] [--hangups 10] [--seed 1]

One run goes through all of them. A second start is made under plain python, with --fresh, under
deepspeed, at the same moment as the first, or as Slurm makes it after a requeue while the old ranks
still live. Writes benchmarks/results/owners.json (--out) and exits 1 if a loss or the final state
differs in one bit from the undisturbed run's, a start that should have been refused was not, or a
step that was done before a stop was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

import torch  # noqa: E402
import twin  # noqa: E402
from kills import state, updates_done, wait_for_steps  # noqa: E402
from launch import Launcher, Started, start_ranks  # noqa: E402
from pictures import write_pictures  # noqa: E402
from twin import losses, train  # noqa: E402
from waiting import until  # noqa: E402

RANKS = 2
SECOND = ("plain", "fresh", "deepspeed", "together", "requeue")
LAUNCHERS: tuple[Launcher, ...] = ("plain", "plain", "deepspeed", "mpirun", "torchrun")
LONGEST = 300.0  # seconds until something is stuck


class Soak:
    """One run that is started again and again.

    Args:
        folder: For pictures and runs.
        updates: Steps of the run.
        seed: Seed of the random moments.
    """

    def __init__(self, folder: Path, updates: int, seed: int) -> None:
        self.pictures = write_pictures(folder / "pictures", 26)
        self.run_dir, self.draw = folder / "run", random.Random(seed)
        self.words = (
            *("--optim.max_steps", str(updates), "--runtime.save_every", "7"),
            *("--student.architecture.depths", "1", "1"),
            *twin.WITH_LOADERS,
        )
        self.restarts = 0
        self.met: Counter[str] = Counter()
        self.wrong: list[str] = []

    def start(self, launcher: Launcher = "plain", *more: str) -> Started:
        """Starts the run as this restart of a Slurm job; under launchers too, they hand it on."""
        words = twin.words(self.pictures, self.run_dir, *self.words, *more)
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(self.restarts)}
        return start_ranks(twin.TRAIN, *words, ranks=RANKS, launcher=launcher, env=job)

    def rest(self, seconds: float) -> None:
        """Waits for a random moment."""
        time.sleep(self.draw.uniform(0.0, seconds))

    def ends(self, started: Started) -> list[int]:
        """Waits for a start's end; returns its codes."""

        def codes() -> list[int | None]:
            return [process.poll() for process in started.processes]

        def told() -> str:
            return f"{codes()}\n" + "\n".join(started.outputs())[-6000:]

        until(lambda: None not in codes(), LONGEST, told)
        return codes()

    def stop(self, started: Started, number: signal.Signals) -> None:
        """A signal to the whole process group, as a terminal sends it."""
        for process in started.processes:
            os.killpg(process.pid, number)

    def double(self, number: int) -> None:
        """One second start beside a living one."""
        kind = SECOND[number % len(SECOND)]
        first = self.start()
        second = None
        try:
            if kind != "together":
                # A quarter before the first step.
                if self.draw.random() < 0.75:
                    wait_for_steps(first, 1, LONGEST)
                else:
                    first.until((self.run_dir / "owner.json").exists, LONGEST)
                self.rest(1.0)
            if kind == "requeue":
                self.restarts += 1
            launcher: Launcher = "deepspeed" if kind == "deepspeed" else "plain"
            second = self.start(launcher, *(["--fresh"] if kind == "fresh" else []))
            if kind == "requeue":
                loser, winner, refused = first, second, {1, 3}
            elif kind == "together":
                both = (*first.processes, *second.processes)
                until(
                    lambda: any(p.poll() is not None for p in both), LONGEST, "neither was refused"
                )
                lost_first = any(p.poll() is not None for p in first.processes)
                loser, winner = (first, second) if lost_first else (second, first)
                refused = {2}
            else:
                loser, winner, refused = second, first, {2}
            if not set(codes := self.ends(loser)) <= refused:
                self.wrong.append(f"{kind}: {codes}\n" + "\n".join(loser.outputs())[-3000:])
            # The other trains on, and saves when it is asked to.
            wait_for_steps(winner, updates_done(winner) + 1, LONGEST)
            self.stopped(winner, signal.SIGTERM, "plain")
            self.met[f"second start: {kind}"] += 1
        finally:
            first.kill()
            if second is not None:
                second.kill()

    def stopped(self, started: Started, number: signal.Signals, launcher: str) -> None:
        """Stops a start that trains; nothing that it did may be lost."""
        for process in started.processes:
            if number == signal.SIGTERM:
                process_kill(process.pid, number)
            else:
                os.killpg(process.pid, number)
        codes = self.ends(started)
        # deepspeed's command ends before its ranks.
        until(lambda: not started.pids(), LONGEST, lambda: f"still there: {started.pids()}")
        if number == signal.SIGHUP and launcher == "mpirun":
            return  # It dies, and its ranks are killed: the next start makes their steps again.
        status = json.loads((self.run_dir / "summary.json").read_text())["status"]
        rows = len(losses(self.run_dir))
        saved = max((p.name for p in self.run_dir.glob("checkpoints/step_????????")), default="")
        if status != "preempted" or saved != f"step_{rows:08d}":
            self.wrong.append(f"{number.name} {launcher}: {codes}, {status}, {rows} rows, {saved}")
        elif launcher == "plain" and codes != [75] * RANKS:
            self.wrong.append(f"{number.name} {launcher}: {codes}")

    def signalled(self, number: signal.Signals, index: int) -> None:
        """Ctrl-C or a closed terminal: while it trains, or, one of five, while it starts."""
        launcher = LAUNCHERS[index % len(LAUNCHERS)]
        started = self.start(launcher)
        try:
            if index % 5 == 1:
                started.until((self.run_dir / "owner.json").exists, LONGEST)
                self.rest(2.0)
                self.stop(started, number)
                self.ends(started)
                self.met[f"{number.name} while it started"] += 1
                return
            wait_for_steps(started, 1, LONGEST)
            self.rest(1.0)
            self.stopped(started, number, launcher)
            self.met[f"{number.name} under {launcher}"] += 1
        finally:
            started.kill()


def process_kill(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("doubles", 20), ("interrupts", 20), ("hangups", 10), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/owners.json"))
    arguments = parser.parse_args()
    # What a shell's `&` or nohup ignores, the ranks would ignore as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    begin = time.monotonic()
    updates = 12 * (arguments.doubles + arguments.interrupts + arguments.hangups)
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), updates, arguments.seed)
        for number in range(arguments.doubles):
            soak.double(number)
            print(number + 1, dict(soak.met), soak.wrong, flush=True)
        for signal_number, count in (
            (signal.SIGINT, arguments.interrupts),
            (signal.SIGHUP, arguments.hangups),
        ):
            for index in range(count):
                soak.signalled(signal_number, index)
                print(index + 1, dict(soak.met), soak.wrong, flush=True)
        done = len(losses(soak.run_dir))
        soak.restarts += 1
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(soak.restarts)}
        calm, limit = Path(scratch) / "calm", 1800
        finished = train(
            soak.pictures, soak.run_dir, *soak.words, ranks=RANKS, env=job, timeout=limit
        )
        train(soak.pictures, calm, *soak.words, ranks=RANKS, timeout=limit)
        alone, together = state(calm, updates), state(soak.run_dir, updates)
        same = alone.keys() == together.keys() and all(
            torch.equal(values, together[key]) for key, values in alone.items()
        )
        results = {
            "command": " ".join(["python tests/soak/owners.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "ranks": RANKS,
            **dict(sorted(soak.met.items())),
            "steps": updates,
            "steps when the last of them was over": done,
            "went otherwise than it should": soak.wrong,
            "final state equal to the bit": same,
            "losses equal to the bit": losses(soak.run_dir) == losses(calm),
            "minutes": round((time.monotonic() - begin) / 60, 1),
        }
        assert finished.returncodes == [0] * RANKS
    text = json.dumps(results, indent=1)
    Path(arguments.out).write_text(text + "\n")
    print(text)
    return 0 if same and results["losses equal to the bit"] and not soak.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
