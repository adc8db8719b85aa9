"""Names in tables, as their files' texts have them and as Python has them."""

from __future__ import annotations

from importlib import import_module

import pytest

from fd_large.cli.train import _OPTIMISERS, _TRACKERS
from fd_large.recipes.tables import keys_of
from fd_large.tasks.distillation.section import NAMED

READ = [
    *(table for _, tables in NAMED.values() for table in tables.items()),
    *((file, (table,)) for _, _, file, table in (_OPTIMISERS, _TRACKERS)),
    *((f"tasks/{task}/task.py", ("HEADS",)) for task in ("segmentation", "depth", "detection")),
]


@pytest.mark.parametrize(("file", "tables"), READ)
def test_the_text_of_a_file_has_the_keys_of_its_tables(file, tables):
    module = import_module(f"fd_large.{file.removesuffix('.py').replace('/', '.')}")
    assert keys_of(file, *tables) == tuple(key for name in tables for key in getattr(module, name))
