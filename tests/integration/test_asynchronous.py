"""Runs on a device that lags behind the host: what waits for it, and that events order the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import twin
from launch import read_results, run_ranks
from pictures import write_pictures

PROGRAM = Path(__file__).parent / "programs" / "asynchronous_run.py"
STEPS = 5

# What the host waits for in a step, the table of docs/architecture.md: (what, where) -> how often.
AGREEMENT = {"read: loop._agree": 1}
# A gather more than two behind; there is at most one for each module of the student or a teacher.
GATHERS = {"event: partitioned_param_coordinator._fetch_sub_module_impl": 200}
STAGE_2 = AGREEMENT | {"read: utils.is_invalid_grad_norm": 3}
STAGE_3 = AGREEMENT | {
    "read: utils.is_invalid_grad_norm": 1,
    # Of each micro batch: the last sums of gradients, and those before more than two others.
    "stream: stage3.independent_gradient_partition_epilogue": 1,
    "event: stage3.__reduce_and_partition_ipg_grads": 1,
}
SAVED = ("--runtime.save_every", "2", "--optim.ema_decay", "0.9", "--eval.every", "2")
RUNS = {
    "zero2": ("zero2", 2, STAGE_2, ()),
    "zero3": ("zero3", 2, STAGE_3, SAVED),
}


def train(folder: Path, words: list[str], ranks: int) -> list[dict]:
    """Trains on ranks, and returns what each of them saw."""
    run_ranks(PROGRAM, folder, *words, ranks=ranks, results=folder)
    found = read_results(folder, ranks)
    assert [one["code"] for one in found] == [0] * ranks
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_as_the_table_says_and_events_order_the_rest(tmp_path, name):
    config, ranks, table, flags = RUNS[name]
    pictures = write_pictures(tmp_path / "pictures", 40)
    length = ("--optim.max_steps", str(STEPS))
    words = twin.words(pictures, tmp_path / "run", *length, *flags, config=config, ranks=ranks)
    for found in train(tmp_path, words, ranks):
        assert found["races"] == []
        assert len(found["steps"]) == STEPS
        # In the first step DeepSpeed comes to know the modules, and after the last one the teacher
        # is looked at.
        for step in map(str, range(2, STEPS)):
            waits = Counter(found["steps"][step])
            assert waits - Counter(GATHERS | table) == Counter(), step
