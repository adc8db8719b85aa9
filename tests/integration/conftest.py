"""The files that take longest come first: what one core begins last, the other waits for."""

from __future__ import annotations

import pytest

LONGEST = (
    "test_slurm.py",
    "test_several_teachers.py",
    "test_numerics.py",
    "test_preemption.py",
    "test_training.py",
    "test_detection.py",
    "test_checkpoint.py",
    "test_training_oracles.py",
    "test_detection_ranks.py",
    "test_transfer.py",
    "test_students.py",
    "test_disk.py",
    "test_kernels_step.py",
    "test_guard.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by file; the tests of a file stay in order."""
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))
