"""A file is whole or as it was, whatever happens while it is written."""

import json

import pytest

from fd_large.atomic_files import new_folder, out_folder, replacing, write_json
from fd_large.errors import ConfigError


def torn(path):
    path.write_text("other")
    raise OSError("torn")


def test_a_reader_never_sees_half_a_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with replacing(file) as aside:
        aside.write_text("half")
        assert json.loads(file.read_text()) == {"a": 1}
    assert file.read_text() == "half"
    with pytest.raises(OSError, match="torn"), replacing(file) as aside:
        torn(aside)
    assert file.read_text() == "half"
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "half"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "new"
    with (
        pytest.raises(ConfigError, match="cannot be written; got torn"),
        new_folder(out, where="export") as part,
    ):
        torn(part / "half")
    assert list(out.parent.iterdir()) == []
    with new_folder(out, where="export") as part:
        (part / "whole").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    with (
        pytest.raises(ConfigError, match="something is there already"),
        new_folder(out, where="export"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    assert out_folder(tmp_path / "a" / "b").is_dir()
    assert out_folder(str(tmp_path / "a")).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        out_folder(tmp_path / "file" / "b")
