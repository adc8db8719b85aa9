"""Counts the FLOPs, traffic and memory of a step of each published recipe, for `plan`.

    python benchmarks/keep_counts.py

It counts every recipe on the meta device for every named card, with fused and with reference
kernels, and writes fd_large/plan/kept_counts.json. Run the script again when a recipe, a model or
a kernel changes.
"""

from __future__ import annotations

import sys
import time

from harness import ROOT

sys.path[:0] = [str(ROOT)]

from fd_large.cli.plan_workload import count_anew, shape_fields  # noqa: E402
from fd_large.kernels.choose import CAPABILITIES  # noqa: E402
from fd_large.plan import kept_counts  # noqa: E402
from fd_large.plan.counts import Counts  # noqa: E402
from fd_large.plan.rates import CARDS  # noqa: E402
from fd_large.recipes import registry  # noqa: E402


def main() -> int:
    """Counts the steps of all recipes, writes the counts and returns the exit code."""
    cards = {rates.capability: rates for rates in CARDS.values()}
    counts = {}
    for name in registry.RECIPES:
        run, begin = registry.get(name), time.perf_counter()
        # Cards differ by whether the fused kernels run on them.
        counted: dict[bool, dict[bool, Counts]] = {}
        for capability, rates in cards.items():
            for kernels in ("fused", "reference"):
                fused = (
                    kernels == "fused" and tuple(map(int, capability.split("."))) in CAPABILITIES
                )
                if fused not in counted:
                    counted[fused] = count_anew(run, rates, kernels)
                key = kept_counts.key(shape_fields(run), capability, kernels)
                counts[key] = counted[fused]
        print(f"{name}: {time.perf_counter() - begin:.1f} s")
    kept_counts.write(counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
