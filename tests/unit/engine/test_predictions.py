"""Predictions in the folder of a run."""

import numpy as np

from fd_large.engine.predictions import FILE, Predictions


def test_they_come_back(tmp_path):
    written = Predictions(np.array([1, 0, 2]), np.array([1, -1, 0]))
    written.write(tmp_path)
    found = Predictions.read(tmp_path)
    assert all((one == other).all() for one, other in zip(found, written, strict=True))


def test_where_there_are_none_or_half_of_them_there_are_none(tmp_path):
    assert Predictions.read(tmp_path) is None
    Predictions(np.arange(99), np.arange(99)).write(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    assert Predictions.read(tmp_path) is None
