"""Names of shards by braces: written out, or refused where there are too many, before any is."""

from __future__ import annotations

import pytest

from fd_large.cli.main import main
from fd_large.data import braces
from fd_large.data.braces import expand_braces
from fd_large.errors import DataError


def test_braces_are_written_out():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{2..1}") == ["a2", "a1", "b2", "b1"]
    assert expand_braces("{a}") == ["{a}"]
    assert len(expand_braces("{1..1000}-{1..1000}")) == 1_000_000


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{0..999999999}.tar",
        "{0..9999}{0..9999}",
        "{a,b}" * 64,
        "{x{0..2000000}y,z}",
        f"{{0..{'9' * 5000}}}",
        f"{{{'0' * 100_000}1..900000}}",
    ],
)
def test_too_many_names_are_refused_and_none_is_made(pattern, monkeypatch):
    monkeypatch.setattr(braces, "product", None)
    with pytest.raises(DataError, match=r"^eval\.root: ") as refused:
        expand_braces(pattern, where="eval.root")
    assert len(str(refused.value)) < 600


def test_the_command_tells_it_before_torch(capsys):
    words = ["train", "--deepspeed_config", "zero3", "--data.root", "shards/{0..999999999}.tar"]
    assert main(words) == 2
    assert "data.root" in capsys.readouterr().err
