"""The list of allowed code: where it stands, who may write it, and starts without one."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from fd_large import allowed_code
from fd_large.allowed_code import HASHES, NAMES, add, place, read

NAME, DIGEST, FILE = "module:/a/mine.py:cosine", "ab" * 32, Path("/a/mine.py")


def file() -> Path:
    found = place()
    assert found is not None
    return found


def test_it_is_written_for_the_user_alone(tmp_path: Path) -> None:
    assert read() == ({}, "")
    before = os.umask(0)
    try:
        add(NAME, DIGEST, FILE)
    finally:
        os.umask(before)
    assert read() == ({NAME: {DIGEST: str(FILE)}}, "")
    assert stat.S_IMODE(file().stat().st_mode) == 0o600
    assert stat.S_IMODE(file().parent.stat().st_mode) == 0o700
    assert [path.name for path in file().parent.iterdir()] == [file().name]


def test_older_entries_stay_up_to_a_number() -> None:
    for index in range(HASHES + 2):
        add(NAME, str(index), FILE)
    assert list(read()[0][NAME]) == [str(index) for index in range(2, HASHES + 2)]
    file().write_text(json.dumps({str(index): {} for index in range(NAMES)}))
    add(NAME, DIGEST, FILE)
    entries, _ = read()
    assert len(entries) == NAMES
    assert NAME in entries
    assert "0" not in entries


def test_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert place() == Path("/state/fd_large/allowed_code.json")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert place() == Path("/home/me/.local/state/fd_large/allowed_code.json")
    monkeypatch.delenv("HOME")
    assert place() is None
    add(NAME, DIGEST, FILE)
    assert read() == ({}, "")


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
@pytest.mark.parametrize("part", ["file", "folder"])
def test_what_others_can_write_is_not_believed_and_not_touched(part: str, mode: int) -> None:
    add(NAME, DIGEST, FILE)
    path = file() if part == "file" else file().parent
    path.chmod(mode | (0o100 if part == "folder" else 0))
    before = file().read_text()
    entries, reason = read()
    assert not entries
    assert str(path) in reason
    add(NAME, "other", FILE)
    assert file().read_text() == before


def test_what_is_another_users_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    add(NAME, DIGEST, FILE)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    entries, reason = read()
    assert not entries
    assert f"owner {owner}" in reason


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "dangling"])
def test_a_list_that_is_no_file_is_not_believed(kind: str, tmp_path: Path) -> None:
    file().parent.mkdir(mode=0o700, parents=True)
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({NAME: {DIGEST: str(FILE)}}))
    foreign.chmod(0o600)
    if kind == "pipe":
        os.mkfifo(file(), 0o600)
    elif kind == "folder":
        file().mkdir(0o700)
    else:
        file().symlink_to(foreign if kind == "link" else tmp_path / "nothing")
    entries, reason = read()
    assert not entries
    assert reason
    add(NAME, DIGEST, FILE)
    assert not (tmp_path / "nothing").exists()
    assert json.loads(foreign.read_text()) == {NAME: {DIGEST: str(FILE)}}


def test_a_linked_folder_is_not_believed(tmp_path: Path) -> None:
    add(NAME, DIGEST, FILE)
    file().parent.rename(tmp_path / "elsewhere")
    file().parent.symlink_to(tmp_path / "elsewhere")
    entries, reason = read()
    assert not entries
    assert reason


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "null", '{"a": 1}', '{"a": {"b": 1}}', "{" * 10, "[" * 100_000, b"\xff\xfe"],
)
def test_a_damaged_list_is_said_and_written_anew(text: str | bytes) -> None:
    add(NAME, DIGEST, FILE)
    file().write_bytes(text if isinstance(text, bytes) else text.encode())
    entries, reason = read()
    assert not entries
    assert reason.startswith(f"{file()}: ")
    add(NAME, DIGEST, FILE)
    assert read() == ({NAME: {DIGEST: str(FILE)}}, "")


@pytest.mark.parametrize("home", ["/dev/null", "/proc/self", "/proc/no/such"])
def test_a_home_that_cannot_be_written_is_none(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", home)
    add(NAME, DIGEST, FILE)
    assert read()[0] == {}


def test_a_full_disk_leaves_the_list_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    add(NAME, DIGEST, FILE)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    add("module:/b.py:x", DIGEST, Path("/b.py"))
    assert read() == ({NAME: {DIGEST: str(FILE)}}, "")
    assert len(list(file().parent.iterdir())) == 1


def _adds(start: int) -> None:
    for index in range(start, start + 10):
        add(f"module:/{index}.py:x", DIGEST, Path(f"/{index}.py"))


def test_starts_at_the_same_time_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=_adds, args=(10 * index,)) for index in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join(60)
        assert start.exitcode == 0
    assert len(read()[0]) == 30


def test_a_turn_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    add(NAME, DIGEST, FILE)
    monkeypatch.setattr(allowed_code, "_TURN_SECONDS", 0.05)
    with allowed_code._turn(file().parent):
        add("module:/b.py:x", DIGEST, Path("/b.py"))
    assert len(read()[0]) == 2
