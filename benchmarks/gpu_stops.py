"""Does a run on GPUs resume after a kill, and end when a rank is lost? A part of gpu_runs.sh.

    python benchmarks/gpu_stops.py save FOLDER RANKS FLAGS_OF_TRAIN...
    python benchmarks/gpu_stops.py lost FOLDER RANKS FLAGS_OF_TRAIN...

`save` kills a run two steps after a checkpoint, resumes it on all ranks and then on half of them,
and compares the losses. `lost` suspends one rank of a run, kills one rank of another run, and
measures how long the other ranks stay.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAM = Path(__file__).with_name("gpu_train.py")
SAVE_EVERY = 4
PATIENCE = 60.0  # Seconds without what is waited for.
# Seconds after which the watchdog takes a run for hung, and that others may stay after a kill.
HUNG, LEAVE = 15, 10
RECOMPUTED = 1e-4  # Share of a loss by which other ranks' sums may differ.


class Started:
    """Run that was started by a launcher, with its processes.

    Args:
        folder: Folder for the run's folder and the output of its processes.
        ranks: Number of ranks.
        flags: Flags of `train`.
    """

    def __init__(self, folder: Path, ranks: int, flags: Iterable[str]) -> None:
        self.folder = folder
        (folder / "exits").mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(PROGRAM), *flags]
        command += ["--runtime.run_dir", str(folder / "run"), "--runtime.log_every", "1"]
        command += ["--optim.max_steps", "100000", "--optim.warmup_epochs", "0"]
        environment = {**os.environ, "FD_LARGE_EXITS": str(folder / "exits")}
        self.log_file = folder / "run/logs/rank_00000.log"
        # A later start appends to the log of those before.
        self.logged_before = self.log_file.stat().st_size if self.log_file.exists() else 0
        with (folder / "output").open("a") as output:
            self.process = psutil.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """Returns {rank: process} of the ranks, without the launcher."""
        processes = {}
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                if str(PROGRAM) in process.cmdline() and "--standalone" not in process.cmdline():
                    processes.setdefault(int(process.environ().get("RANK", "0")), process)
        return processes

    def losses(self) -> dict[int, float]:
        """Returns {index of the step: loss} from metrics.jsonl."""
        path = self.folder / "run/metrics.jsonl"
        rows = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError):  # It is being written.
                row = json.loads(line)
                rows[row["update"]] = row["loss"]
        return rows

    def log(self) -> str:
        """Returns the text that rank 0 has logged since this object started the run."""
        logged = self.log_file.read_bytes() if self.log_file.exists() else b""
        return logged[self.logged_before :].decode(errors="replace")

    def until(self, holds: Callable[[], bool], condition: str, patience: float = PATIENCE) -> float:
        """Waits until a condition holds; returns the seconds of waiting.

        Args:
            holds: Function that returns whether the condition holds.
            condition: Description of the condition, for the message.
            patience: Largest number of seconds to wait.

        Raises: SystemExit: if the condition does not hold in time, or the run ends before.
        """
        begin = time.time()
        while not holds():
            if time.time() - begin > patience or (self.process.poll() is not None and not holds()):
                self.kill()
                output = (self.folder / "output").read_text(errors="replace").splitlines()
                raise SystemExit(
                    f"{condition}: not within {time.time() - begin:.0f} s; {output[-1:]}"
                )
            time.sleep(0.1)
        return time.time() - begin

    def kill(self) -> None:
        """Kills all processes of the run."""
        processes = [*self.process.children(recursive=True), self.process]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        # A rank that is still dying may write.
        psutil.wait_procs(processes, timeout=LEAVE)


def save(folder: Path, ranks: int, flags: list[str]) -> None:
    """Prints how long training waits for saves, and whether a killed run resumes with equal losses.

    Args:
        folder: Folder for the run's folder and the output of its processes.
        ranks: Number of ranks.
        flags: Flags of `train`.
    """
    flags = [*flags, "--runtime.keep_last", "1"]
    checkpoints = folder / "run/checkpoints"

    def step_of() -> int:
        return max((int(path.name[5:]) for path in checkpoints.glob("step_????????")), default=0)

    def goes_on(ranks: int) -> tuple[int, dict[int, float], float]:
        """Resumes the killed run for two steps.

        Args:
            ranks: Number of ranks of the resumed run.

        Returns: the step of the checkpoint; {step: loss} of the resumed run, for steps that the
            killed run had made, too; and the seconds until the second step.

        Raises: SystemExit: if the resumed run has made no step that the killed run had made.
        """
        began, rows = step_of(), folder / "run/metrics.jsonl"
        # The killed run's rows of later steps would be taken for this start's.
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:began]))
        begin = time.time()
        # No further checkpoint, so that the next start goes on from the same step.
        started = Started(folder, ranks, [*flags, "--runtime.save_every", "100000"])
        try:
            started.until(lambda: f"resumed after step {began} " in started.log(), "it resumes")
            started.until(lambda: len(started.losses()) >= began + 2, "two steps")
            seconds = time.time() - begin
        finally:
            started.kill()
        losses = {n: loss for n, loss in started.losses().items() if n >= began and n in known}
        if not losses:
            raise SystemExit(f"DECIDED: NOTHING TO COMPARE from step {began}; known {[*known]}")
        return began, losses, seconds

    started = Started(folder, ranks, [*flags, "--runtime.save_every", str(SAVE_EVERY)])
    started.until(lambda: step_of() >= SAVE_EVERY, "a checkpoint", 2 * PATIENCE)
    started.until(lambda: len(started.losses()) >= step_of() + 2, "two steps after it")
    waits = re.findall(r"checkpoint of step \d+: training waited ([\d.]+) s", started.log())
    started.kill()
    known = started.losses()
    print(f"save: training waited {', '.join(waits)} s for its checkpoints")
    began, again, seconds = goes_on(ranks)
    equal = "equal" if all(known[n] == loss for n, loss in again.items()) else "OTHER"
    print(f"resume: two steps {seconds:.1f} s after the start, from step {began}")
    print(f"DECIDED: a killed run goes on with {equal} losses in {[*again]}")
    if ranks > 1:
        _, fewer, _ = goes_on(ranks // 2)
        most = max(abs(loss / known[step] - 1) for step, loss in fewer.items())
        verdict = "yes" if most <= RECOMPUTED else "NO"
        print(
            f"DECIDED: {ranks // 2} of {ranks} ranks go on: {verdict}, losses differ by {most:.1e}"
        )


def lost(folder: Path, ranks: int, flags: list[str]) -> None:
    """Prints how a run ends after the last rank was suspended, and after that rank was killed.

    Args:
        folder: Folder for the folders of the two runs and the output of their processes.
        ranks: Number of ranks.
        flags: Flags of `train`.
    """
    flags = [*flags, "--runtime.save_every", "100000", "--fresh"]
    flags += ["--runtime.watchdog_seconds", str(HUNG)]
    for name, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
        started = Started(folder / name, ranks, flags)
        started.until(lambda: len(started.losses()) >= 4, "four steps")  # noqa: B023
        processes = started.ranks()
        processes.pop(ranks - 1).send_signal(number)
        begin = time.time()
        _, alive = psutil.wait_procs(processes.values(), timeout=HUNG + PATIENCE)
        seconds = time.time() - begin
        started.kill()
        codes = {
            path.stem: json.loads(path.read_text())["code"]
            for path in sorted((folder / name / "exits").glob("rank_*.json"))
        }
        print(f"{name}: the others left after {seconds:.1f} s, {len(alive)} stayed; codes {codes}")
        if number == signal.SIGKILL:
            print(f"DECIDED: they leave within {LEAVE} s: {'yes' if seconds <= LEAVE else 'NO'}")
        else:
            named = re.findall(r"(?i).*(?:waits? (?:for|in)|collective).*", started.log())
            print(
                "DECIDED: the watchdog says: " + (named[-1].strip()[:200] if named else "NOTHING")
            )


if __name__ == "__main__":
    {"save": save, "lost": lost}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
