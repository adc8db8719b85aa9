"""The model of an export in two lines of Python: the student's own tokens."""

from __future__ import annotations

import pytest
from loading import IMAGES, close
from stored_run import STUDENTS, store_student

from fd_large.backbones.statistics import IMAGENET
from fd_large.cli import export as command
from fd_large.errors import WeightsError
from fd_large.weights.load import load_model


@pytest.mark.parametrize(
    ("what", "to"),
    [("swin", "fd"), ("vit with a shared table", "timm"), ("swinv2 of two stages", "hf")],
)
def test_the_students_tokens(tmp_path, what, to):
    name, fields = STUDENTS[what]
    net = store_student(tmp_path / "run", name, fields)
    assert command.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", to]) == 0
    loaded, statistics = load_model(tmp_path / "out")
    close(loaded(IMAGES).tokens, net(IMAGES).tokens)
    assert statistics[:2] == IMAGENET[:2]


def test_a_student_of_timm(tmp_path):
    net = store_student(tmp_path / "run", "timm:test_convnext2", {})
    assert command.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "timm"]) == 0
    close(load_model(tmp_path / "out")[0](IMAGES).tokens, net(IMAGES).tokens)


def test_another_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"got no config\.json"):
        load_model(tmp_path)
