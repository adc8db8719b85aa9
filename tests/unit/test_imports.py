"""Packages that are left out of an import look as if they were not installed, for that long."""

from __future__ import annotations

import sys

import pytest

from fd_large.imports import without


def test_what_is_left_out_is_there_again_afterwards(tmp_path, monkeypatch):
    (tmp_path / "taking_long.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with without("taking_long"), pytest.raises(ImportError):
        import taking_long  # noqa: F401
    import taking_long as found

    assert found.value == 1
    # What is imported already stays.
    with without("taking_long"):
        assert sys.modules["taking_long"] is found
    assert sys.modules["taking_long"] is found
    del sys.modules["taking_long"]
