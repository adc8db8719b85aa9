"""The published training runs, replayed by the engine on one rank and on two."""

from __future__ import annotations

import oracles
import pytest
from oracle_files import oracle_paths


@pytest.mark.closeness
@pytest.mark.parametrize(
    "path",
    oracle_paths("*_training_run*", "multi/*_training_run"),
    ids=lambda path: path.stem,
)
def test_oracle(path):
    verdict = oracles.check_file(path)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
