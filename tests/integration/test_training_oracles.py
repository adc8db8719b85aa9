"""The published training runs, replayed by the engine on one rank and on two."""

from __future__ import annotations

import oracles
import pytest
from oracle_files import FOLDER


@pytest.mark.closeness
@pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no oracles at {FOLDER}; set FD_ORACLES to their folder"
)
@pytest.mark.parametrize(
    "path",
    sorted([*FOLDER.glob("*_training_run*.json"), *FOLDER.glob("multi/*_training_run.json")]),
    ids=lambda path: path.stem,
)
def test_oracle(path):
    verdict = oracles.check_file(path)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
