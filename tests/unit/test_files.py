"""A file is whole or as it was, whatever happens while it is written."""

import errno
import json
import os
from contextlib import suppress

import pytest

from fd_large import files
from fd_large.errors import ConfigError, DataError, StorageError
from fd_large.files import (
    check_out,
    json_object,
    kind_of,
    new_folder,
    out_folder,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    unusable,
    write_json,
)


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
        pytest.raises(ConfigError, match=r"export: .*new: "),
        new_folder(out, where="export") as part,
    ):
        torn(part / "half")
    assert list(out.parent.iterdir()) == []
    with new_folder(out, where="export") as part:
        (part / "whole").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    with (
        pytest.raises(ConfigError, match=r"^export: .*new: .*already"),
        new_folder(out, where="export"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    assert out_folder(tmp_path / "a" / "b").is_dir()
    assert out_folder(str(tmp_path / "a")).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        out_folder(tmp_path / "file" / "b")


def test_the_kind_of_a_path(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    kinds = {name: kind_of(tmp_path / name, where="--a") for name in os.listdir(tmp_path)}
    assert kinds == {"file": "file", "link": "file", "dangling": None, "pipe": "other"}
    assert kind_of(tmp_path, where="--a") == "folder"
    assert kind_of(tmp_path / "file" / "below", where="--a") is None


def test_what_the_file_system_refuses_is_a_sentence(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("a" * 300), tmp_path / "loop", "a\0b", ""):
        with pytest.raises(DataError, match=r"--data\.root"):
            kind_of(path, where="--data.root", of=DataError)


def test_a_folder_that_may_not_be_entered_is_a_sentence(monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files.os, "stat", refuse)
    with pytest.raises(ConfigError, match="chmod"):
        kind_of(tmp_path, where="--data.root")


def test_an_error_that_passes_does_not_blame_the_path():
    assert isinstance(unusable("--out", OSError(errno.EIO, "I/O error", "a")), StorageError)
    assert "Make room" in str(unusable("--out", OSError(errno.ENOSPC, "No space left")))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "", "null", "[1]", "\udcff", "{", "1" * 5000, "1" * 41],
)
def test_damaged_json_is_a_sentence(tmp_path, text):
    file = tmp_path / "recipe.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"report: .*recipe\.json"):
        read_json(file, where="report", holds=dict, of=DataError)


def test_json_is_bounded_and_finite_where_that_is_asked(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    assert read_json(file, where="report", holds=dict) == {"a": 1}
    for path in (file, tmp_path, tmp_path / "absent", "/dev/zero"):
        with pytest.raises(ConfigError, match="report: "):
            read_json(tmp_path / path, where="report", max_bytes=3)
    assert parse_json(b"[Infinity, 1e999]") == [float("inf")] * 2
    assert parse_json("[" + "1" * 400 + ", 7]", long_as_float=True) == [float("inf"), 7]
    for text in ("Infinity", "NaN", "-1e999"):
        with pytest.raises(ValueError, match="for a number"):
            parse_json(text, finite=True)


def test_a_file_with_a_secret_is_for_its_owner_alone(tmp_path):
    file, url = tmp_path / "a.json", "https://u:PW@h"
    for value, private in (("a", False), (url, True), ("https://h/?s", True), ("", False)):
        write_json(file, {"root": value})
        assert json.loads(file.read_text()) == {"root": value}
        assert (file.stat().st_mode & 0o077 == 0) == private


def test_json_that_is_nested_deeply_is_refused_before_anybody_walks_through_it(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" * 150 + "]" * 150)
    with pytest.raises(ConfigError, match="too deeply"):
        read_json(file)
    assert json_object(file) == {}


def test_json_that_can_be_done_without(tmp_path):
    file = tmp_path / "a.json"
    assert json_object(file) == {}
    for text, held in (('{"a": 1}', {"a": 1}), ("[1]", {}), ("{", {}), ("", {})):
        file.write_text(text)
        assert json_object(file) == held


def test_of_what_cannot_be_written_nothing_stays(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, 1, private=True)
    assert file.stat().st_mode & 0o077 == 0
    with suppress(OSError), replacing(file) as aside:
        aside.write_text("half")
        raise OSError(28, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "1\n"


def test_neither_a_pipe_nor_a_device_nor_a_folder_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=f"^--config: {path}: "):
            read_bytes(path, where="--config", of=DataError)


@pytest.mark.parametrize("holds", ["nothing", "file", "folder"])
def test_results_are_tried_before_the_work_and_nothing_is_left_behind(tmp_path, holds):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    for name in ("new", "a/b/new", *([] if holds == "nothing" else [holds])):
        assert check_out(tmp_path / name, where="--out", holds=holds) == tmp_path / name
    wrong = {"file", "folder", "link", "pipe", "file/below", "n" * 300, ""} - {holds}
    for name in wrong:
        with pytest.raises(ConfigError, match=r"^--out: "):
            check_out(tmp_path / name if name else "", where="--out", holds=holds)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_takes_no_file_is_refused_before_the_work():
    with pytest.raises(ConfigError, match=r"^--out: /proc/new: "):
        check_out("/proc/new", where="--out")


def test_nothing_is_written_through_a_link_that_stands_where_a_file_is_written_aside(tmp_path):
    theirs, path = tmp_path / "theirs", tmp_path / "own.json"
    theirs.write_text("theirs")
    (tmp_path / "own.json.part").symlink_to(theirs)
    files.write_json(path, {"own": 1})
    assert theirs.read_text() == "theirs"
    assert not path.is_symlink()
    assert files.read_json(path) == {"own": 1}
