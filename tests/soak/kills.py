"""Thirty SIGKILLs at random moments, a third of them inside a save; the weights must not notice.

    python tests/soak/kills.py [--kills 30] [--seed 1]

Takes some ten minutes on two cores. Writes benchmarks/results/kills.json and exits 1 if the final
state differs in one bit from the uninterrupted run's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

import torch  # noqa: E402
from kills import kill_and_resume, state  # noqa: E402
from pictures import write_pictures  # noqa: E402
from twin import WITH_LOADERS, losses, train  # noqa: E402

UPDATES = 400
WORDS = ("--optim.max_steps", str(UPDATES), "--runtime.save_every", "1", *WITH_LOADERS)


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = write_pictures(folder / "pictures", 26)
        train(pictures, folder / "calm", *WORDS, timeout=900)
        met = kill_and_resume(pictures, folder / "killed", arguments.kills, arguments.seed, *WORDS)
        train(pictures, folder / "killed", *WORDS, timeout=900)
        calm, killed = state(folder / "calm", UPDATES), state(folder / "killed", UPDATES)
        same = calm.keys() == killed.keys() and all(
            torch.equal(values, killed[key]) for key, values in calm.items()
        )
        same_losses = losses(folder / "calm") == losses(folder / "killed")
    results = {
        "command": " ".join(["python tests/soak/kills.py", *sys.argv[1:]]),
        "kills": len(met),
        "of a training run": sum(kill["alive"] for kill in met),
        "inside a save": sum(kill["in a save"] for kill in met),
        "of all ranks": sum(kill["all"] for kill in met),
        "went on from a step above 0": sum(kill["resumed from"] > 0 for kill in met),
        "final state equal to the bit": same,
        "losses equal to the bit": same_losses,
    }
    (ROOT / "benchmarks/results/kills.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0 if same and same_losses else 1


if __name__ == "__main__":
    sys.exit(main())
