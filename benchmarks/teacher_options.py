"""Do all options of several teachers give the losses of one process, on any ranks and resumed?

    python benchmarks/teacher_options.py [--runs 600] [--seed 1]

By hand, beside the pairs that tests/integration/test_several_teachers.py covers: every setting of a
teacher (targets, loss, normaliser, head, grids) in turn, three to a run where there is room, beside
every setting of a run (ranks, ZeRO stage, accumulation, resume, weighting, mixup, datasets, number
of teachers), each list in an order of its own; --runs ends it early. Writes
benchmarks/results/teacher_options.json: how many settings were met, and how far losses are from
those of one plain process at most, by each option.
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
from typing import Any

import harness

sys.path[:0] = [str(harness.ROOT / "tests"), str(harness.ROOT / "tests/integration/programs")]


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


def main() -> int:
    """Trains, compares, writes."""
    arguments = parse()
    import options
    from covering import Row

    options.small_heads()
    forbidden, draw = options.FACTORS.forbidden(), random.Random(arguments.seed)
    of_run = product(dict(options.FACTORS.run), forbidden)
    of_part = product(dict(options.FACTORS.part), forbidden)
    draw.shuffle(of_run)
    draw.shuffle(of_part)
    most = 6 if arguments.quick else arguments.runs
    parts, rows = iter(of_part), {}
    for number, run in enumerate(itertools.cycle(of_run)):
        own = list(itertools.islice(parts, run["parts"]))
        if len(own) < run["parts"] or (most and number == most):
            break
        rows[f"run_{number:04d}"] = Row(run, own)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = options.losses_of(rows, Path(folder))
    worst: dict[str, float] = defaultdict(float)
    for name, (ours, plain) in found.items():
        off = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
        for part in rows[name].parts:
            for factor, value in (rows[name].run | part).items():
                key = f"{factor} {value}"
                worst[key] = max(worst[key], off)
    met = sum(len(row.parts) for row in rows.values())
    results = {
        **harness.conditions(__file__, __doc__),
        "runs": len(rows),
        "settings of a teacher": {"met": met, "of": len(of_part)},
        "settings of a run": {"met": min(len(rows), len(of_run)), "of": len(of_run)},
        "steps": options.STEPS,
        "seconds": time.monotonic() - begin,
        "largest relative difference of a loss": max(worst.values()),
        "by option": dict(sorted(worst.items())),
    }
    harness.write(results, arguments.out)
    print(
        f"{len(rows)} runs: {met} of {len(of_part)} settings of a teacher; losses at most "
        f"{results['largest relative difference of a loss']:.1e} from those of one process"
    )
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
