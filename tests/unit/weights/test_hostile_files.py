"""Whatever is changed in a file, it is read, or refused in one sentence."""

from __future__ import annotations

import pytest
from hostile import run


def test_changed_files_are_read_or_refused(tmp_path):
    pytest.importorskip("transformers")
    outcome = run(300, tmp_path)
    assert outcome.ends.keys() == {"read", "refused"}
    assert outcome.ends.total() == 300
