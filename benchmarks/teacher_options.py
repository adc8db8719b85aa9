"""Do all options of several teachers give the losses of one process, on any ranks and resumed?

    python benchmarks/teacher_options.py [--runs 600] [--seed 1]

By hand, beside the pairs that tests/integration/test_several_teachers.py covers: every setting of a
teacher (targets, loss, normaliser, head, grids) in turn, three to a run where there is room, beside
every setting of a run (ranks, ZeRO stage, accumulation, resume, weighting, mixup, datasets, number
of teachers), each list in an order of its own; --runs ends it early. Writes
benchmarks/results/teacher_options.json as it goes on: how many settings were met, and how far
losses are from those of one plain process at most, by each option.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness

sys.path[:0] = [str(harness.ROOT / "tests"), str(harness.ROOT / "tests/integration/programs")]

if TYPE_CHECKING:
    from covering import Row

TOGETHER = 60
"""Runs of one group of ranks; the results are written after each group."""


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=600, help="at most; 0: until a list ends")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument("--quick", action="store_true", help="six runs")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "teacher_options.json")
    return parser.parse_args()


def product(values: dict[str, Any], forbidden: set[Any]) -> list[dict[str, Any]]:
    """Returns all settings of some factors that are allowed."""
    settings = (dict(zip(values, one, strict=True)) for one in itertools.product(*values.values()))
    return [
        setting
        for setting in settings
        if not forbidden.intersection(map(frozenset, itertools.combinations(setting.items(), 2)))
    ]


def rows_of(of_run: list[dict[str, Any]], of_part: list[dict[str, Any]], most: int) -> list[Row]:
    """Returns runs, at most so many: settings of a run in turn, each setting of a part once."""
    from covering import Row

    parts, rows = iter(of_part), []
    for run in itertools.islice(itertools.cycle(of_run), most or None):
        own = list(itertools.islice(parts, run["parts"]))
        if len(own) < run["parts"]:
            break
        rows.append(Row(run, own))
    return rows


def main() -> int:
    """Trains, compares, writes."""
    arguments = parse()
    import options

    options.small_heads()
    forbidden, draw = options.FACTORS.forbidden(), random.Random(arguments.seed)
    of_run = product(dict(options.FACTORS.run), forbidden)
    of_part = product(dict(options.FACTORS.part), forbidden)
    draw.shuffle(of_run)
    draw.shuffle(of_part)
    most = 6 if arguments.quick else arguments.runs
    rows = rows_of(of_run, of_part, most)
    worst: dict[str, float] = defaultdict(float)
    farthest, seconds = 0.0, 0.0
    found: dict[str, Any] = {}
    for number in range(0, len(rows), TOGETHER):
        some, begin = rows[number : number + TOGETHER], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            losses = options.losses_of(
                {f"run_{n:02d}": r for n, r in enumerate(some)}, Path(folder)
            )
        seconds += time.monotonic() - begin
        for row, (ours, plain) in zip(some, losses.values(), strict=True):
            off = options.difference(ours, plain)
            if off >= farthest:
                farthest, found = off, row._asdict()
            for part in row.parts:
                for factor, value in (row.run | part).items():
                    key = f"{factor} {value}"
                    worst[key] = max(worst[key], off)
        done = rows[: number + len(some)]
        met = sum(len(row.parts) for row in done)
        results = {
            **harness.conditions(__file__, __doc__),
            "runs": len(done),
            "settings of a teacher": {"met": met, "of": len(of_part)},
            "settings of a run": {"met": min(len(done), len(of_run)), "of": len(of_run)},
            "steps": options.STEPS,
            "seconds": seconds,
            "largest relative difference of a loss": farthest,
            "the farthest run": found,
            "by option": dict(sorted(worst.items())),
        }
        harness.write(results, arguments.out)
        print(
            f"{len(done)} runs: {met} of {len(of_part)} settings of a teacher; losses at most "
            f"{farthest:.1e} from those of one process; {seconds:.0f} s",
            flush=True,
        )
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
