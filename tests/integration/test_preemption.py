"""A signal or a file on one rank stops all of them, saved, in training, evaluation and saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import twin
from kills import state, stopped
from launch import Launcher
from pictures import write_pictures
from twin import losses, train

UPDATES = 18
WORDS = f"""
--optim.max_steps {UPDATES} --eval.every 5 --eval.views 8 --runtime.save_every 4
--student.architecture.depths 1 1 --batch.micro_batch_size 2 {" ".join(twin.WITH_LOADERS)}
""".split()

# Moment, how, rank, update before it; then the step of the checkpoint that it leaves, and whether
# the evaluation due there was made. One run goes through all of them, in this order.
STOPS: dict[Launcher, list[tuple[tuple[str, str, int, int], int, bool]]] = {
    "plain": [
        (("micro batch", "SIGTERM", 1, 1), 2, True),
        # Agreed in the step after which an evaluation is due: it is left to the next start,
        (("save", "SIGUSR1", 0, 4), 5, False),
        # which is stopped in it as well, before any update.
        (("evaluation", "file", 1, 5), 5, False),
        # The wish comes after this step's agreement.
        (("judge", "SIGUSR1", 1, 6), 8, True),
    ],
    "deepspeed": [(("evaluation", "SIGTERM", 0, 10), 10, False)],
    "torchrun": [
        (("save", "file", 1, 12), 13, True),
        (("micro batch", "file", 0, 13), 14, True),
    ],
    "mpirun": [
        (("evaluation", "SIGUSR1", 0, 15), 15, False),
        (("save", "SIGTERM", 1, 16), 17, True),
    ],
}
# Exit code of each rank's process; launchers have codes of their own.
CODES: dict[Launcher, list[int]] = {
    "plain": [75, 75],
    "deepspeed": [75],
    "torchrun": [1],
    "mpirun": [75],
}


@pytest.mark.parametrize(
    ("launchers", "newest"),
    [
        (("plain", "deepspeed"), 10),
        pytest.param(("torchrun", "mpirun"), 17, marks=pytest.mark.sweep),
    ],
)
def test_stops_one_after_the_other(
    launchers: tuple[Launcher, ...], newest: int, pictures: Path, tmp_path: Path
) -> None:
    """Each signal and the file, in a step, an evaluation and a save; the curve does not notice."""
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    train(pictures, calm, *WORDS, "--eval.root", str(pictures))
    for launcher in launchers:
        stops = STOPS[launcher]
        folder = tmp_path / launcher
        asked = [stop for stop, _, _ in stops]
        words = twin.words(pictures, run_dir, *WORDS, "--eval.root", str(pictures))
        codes, ranks = stopped(words, folder, asked, launcher=launcher)
        wanted = [
            {"code": 75, "status": "preempted", "update": update, "evaluated": made, "left": []}
            for _, update, made in stops
        ]
        assert ranks == [wanted, wanted], launcher
        assert codes == CODES[launcher], launcher

    resumed = train(pictures, run_dir, *WORDS, "--eval.root", str(pictures))
    assert f"resumed after step {newest} of 18" in resumed.outputs[0]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
    assert losses(run_dir) == losses(calm)
    assert (run_dir / "evaluations.jsonl").read_text() == (calm / "evaluations.jsonl").read_text()
    alone, together = state(calm, UPDATES), state(run_dir, UPDATES)
    assert alone.keys() == together.keys()
    assert all((alone[key] == together[key]).all() for key in alone)


def test_plain_python_with_one_rank_exits_with_75(pictures: Path, tmp_path: Path) -> None:
    stops = [("evaluation", "SIGTERM", 0, 0), ("micro batch", "SIGUSR1", 0, 1)]
    words = twin.words(pictures, tmp_path / "run", *WORDS, "--eval.root", str(pictures))
    codes, (ends,) = stopped(words, tmp_path / "one", stops, ranks=1)
    assert codes == [75]
    assert [(end["status"], end["update"]) for end in ends] == [
        ("preempted", 0),  # Before the first step there is nothing to save.
        ("preempted", 2),
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)
