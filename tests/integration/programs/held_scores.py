"""Rank program: training, whose scorer does not end while the first start of a run lasts.

held_scores.py FLAGS trains as `fd_large/train.py` does. The file is its own scorer too: what the
first start has found after two steps is never scored.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

SCORE = "score"


def score() -> None:
    """In place of `score_shards.main`."""
    from fd_large.tasks.detection.scores import score_shards

    text = sys.stdin.read()
    folder = Path(json.loads(text)["folder"])
    if sys.argv[2] == "first" and folder.name == "update_00000002":
        signal.pause()
    sys.stdin = io.StringIO(text)
    score_shards.main()


def train() -> int:
    """As the command does."""
    from fd_large.cli.main import main
    from fd_large.tasks.detection.scores import scoring_process

    run_dir = Path(sys.argv[sys.argv.index("--runtime.run_dir") + 1])
    start = "later" if (run_dir / "checkpoints").exists() else "first"
    scoring_process.PROGRAM = (__file__, SCORE, start)
    return main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    if sys.argv[1] == SCORE:
        score()
    else:
        sys.exit(train())
