"""A hundred errors of the file system in real runs; losses and weights must not notice.

    python tests/soak/io_errors.py [--errors 100] [--seed 1]

Any operation under checkpoints/ may fail with EIO, ESTALE or ETIMEDOUT, before or after it was
carried out, on any of two ranks: in saves, in resumes, while old checkpoints are removed. The run
is stopped and started again now and then, so that resumes meet errors too. Takes some minutes on
two cores. Writes benchmarks/results/io_errors.json and exits 1 if the final state or a loss differs
in one bit from the undisturbed run's, or a checkpoint was set aside.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

import torch  # noqa: E402
from kills import state  # noqa: E402
from pictures import write_pictures  # noqa: E402
from twin import WITH_LOADERS, losses, train  # noqa: E402

PROGRAM = ROOT / "tests/integration/programs/faulty_files.py"
SHARE = 0.03
STARTS = 60


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--errors", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    words = ("--optim.max_steps", str(arguments.steps), "--runtime.save_every", "1", *WITH_LOADERS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = write_pictures(folder / "pictures", 26)
        log, run_dir = folder / "errors", folder / "faulty"
        codes: list[int] = []
        while len(codes) < STARTS and (not codes or codes[-1] != 0):
            setting = {
                "seed": f"{arguments.seed} {len(codes)}",
                "share": SHARE,
                "stop_after": 5,
                "log": str(log),
            }
            ended = train(
                pictures,
                run_dir,
                *words,
                program=PROGRAM,
                env={"FAULTS": json.dumps(setting)},
                check=False,
                timeout=900,
            )
            codes.append(max(code for code in ended.returncodes if code is not None))
            print(f"start {len(codes)}: exit code {codes[-1]}", flush=True)
            if codes[-1] not in (0, 75):
                print(*ended.outputs, sep="\n")
                break
        train(pictures, folder / "calm", *words, timeout=900)
        met = log.read_text().splitlines()
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
        same_losses = losses(folder / "calm") == losses(run_dir)
        calm, faulty = (state(folder / name, arguments.steps) for name in ("calm", "faulty"))
        same = calm.keys() == faulty.keys() and all(
            torch.equal(values, faulty[key]) for key, values in calm.items()
        )
    results = {
        "command": " ".join(["python tests/soak/io_errors.py", *sys.argv[1:]]),
        "errors": len(met),
        "by kind": Counter(line.split()[1] for line in met),
        "by operation": Counter(line.split()[3] for line in met),
        "answers that were lost": sum(line.endswith(", done") for line in met),
        "by rank": Counter(line.split()[0] for line in met),
        "starts": len(codes),
        "stopped and started again": codes.count(75),
        "checkpoints set aside": sum(name.startswith("damaged") for name in names),
        "final state equal to the bit": same,
        "losses equal to the bit": same_losses,
    }
    (ROOT / "benchmarks/results/io_errors.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    sound = same and same_losses and not results["checkpoints set aside"]
    return 0 if sound and len(met) >= arguments.errors else 1


if __name__ == "__main__":
    sys.exit(main())
