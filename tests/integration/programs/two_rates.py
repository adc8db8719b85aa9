"""train.py, but parameters without weight decay learn at a third of the rate of the others."""

from __future__ import annotations

import sys
from typing import Any

from fd_large.cli import main as cli
from fd_large.engine import loop

one_rate = loop.set_learning_rate


def two_rates(optimizer: Any, rate: float) -> None:
    one_rate(optimizer, rate)
    decayed, not_decayed = optimizer.param_groups
    assert decayed["weight_decay"] > not_decayed["weight_decay"] == 0.0
    not_decayed["lr"] = rate / 3


if __name__ == "__main__":
    loop.set_learning_rate = two_rates
    sys.exit(cli.main(["train", *sys.argv[1:]]))
