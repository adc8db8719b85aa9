"""One build on each node: under a time limit, past stale locks, and the same answer on all ranks.

The compiler is a stand-in that does what torch does with its `lock`.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import textwrap
import threading
from types import SimpleNamespace

import pytest

from fd_large.engine.zero import compiled_ops
from fd_large.ranks import distributed

# As torch.utils.cpp_extension.load: the library appears under a lock that it waits for.
COMPILER = textwrap.dedent(
    """
    import os, pathlib, sys, time
    folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "some_op"
    folder.mkdir(exist_ok=True)
    while (folder / "lock").exists():
        time.sleep(0.05)
    (folder / "lock").touch()
    {what}
    (folder / "some_op.so").touch()
    (folder / "lock").unlink()
    """
)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Lets the operation be `some_op`, in a temporary folder; notes where it is loaded from."""
    found = []

    def load(verbose):
        library = compiled_ops.folder() / "some_op" / "some_op.so"
        assert library.exists()
        assert not (library.parent / "lock").exists(), "torch would wait for ever"
        found.append(library)

    builder = SimpleNamespace(name="some_op", is_compatible=lambda verbose: True, load=load)
    monkeypatch.setattr(compiled_ops, "_builder", lambda name: builder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # What `load` sets is taken back too.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    compiling(monkeypatch, "pass")
    return found


def compiling(monkeypatch, what):
    monkeypatch.setattr(compiled_ops, "BUILD", COMPILER.format(what=what))


def planted(folder, *, age=0.0):
    lock = folder / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (lock.stat().st_mtime - age,) * 2)
    return lock


def test_an_error_without_text_is_told_by_its_class(loaded, monkeypatch):
    def load(verbose):
        raise AssertionError

    builder = SimpleNamespace(name="some_op", is_compatible=lambda verbose: True, load=load)
    monkeypatch.setattr(compiled_ops, "_builder", lambda name: builder)
    assert compiled_ops.load("SomeOp").startswith(
        "the operation does not load: AssertionError (on "
    )


def test_it_is_built_once_on_the_nodes_own_disk(loaded, tmp_path, monkeypatch):
    assert compiled_ops.load("SomeOp") is None
    compiling(monkeypatch, "raise SystemExit('a second build')")
    assert compiled_ops.load("SomeOp") is None
    assert loaded == [loaded[0]] * 2
    assert loaded[0].is_relative_to(tmp_path)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(loaded[0].parent.parent)


def test_the_lock_of_a_start_that_was_killed_is_removed(loaded, caplog):
    lock = planted(compiled_ops.folder())
    assert compiled_ops.load("SomeOp") is None
    assert str(lock) in caplog.text
    assert len(loaded) == 1
    # Also beside a library that is built.
    lock.touch()
    assert compiled_ops.load("SomeOp") is None


def test_in_a_folder_of_the_users_a_lock_is_stale_once_nothing_changes(
    loaded, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    lock = planted(tmp_path / "mine", age=2 * compiled_ops.BUILD_SECONDS)
    assert compiled_ops.load("SomeOp") is None
    assert loaded[0].is_relative_to(tmp_path / "mine")
    # Another program compiles at this moment: nobody waits for it for ever, or disturbs it.
    loaded[0].unlink()
    lock.touch()
    monkeypatch.setattr(compiled_ops, "BUILD_SECONDS", 0.5)
    monkeypatch.setattr(compiled_ops, "_unchanged_seconds", lambda path: 0.0)
    assert "held by another program" in compiled_ops.load("SomeOp")
    assert lock.exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise SystemExit('fatal error: no such header')", "no such header"),
        ("time.sleep(60)", "within"),
    ],
)
def test_what_fails_or_takes_too_long_is_said_and_leaves_no_lock(loaded, what, said, monkeypatch):
    compiling(monkeypatch, what)
    if said == "within":
        monkeypatch.setattr(compiled_ops, "BUILD_SECONDS", 2.0)
    assert said in compiled_ops.load("SomeOp")
    assert not loaded
    compiling(monkeypatch, "pass")
    monkeypatch.setattr(compiled_ops, "BUILD_SECONDS", 60.0)
    assert compiled_ops.load("SomeOp") is None


def test_a_start_beside_another_that_compiles_waits_its_turn(loaded, monkeypatch):
    assert compiled_ops.load("SomeOp") is None
    (turn,) = compiled_ops._private().glob("*.turn")
    monkeypatch.setattr(compiled_ops, "BUILD_SECONDS", 0.5)
    with open(turn) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process compiles" in compiled_ops.load("SomeOp")
    assert compiled_ops.load("SomeOp") is None


def test_ranks_move_while_they_wait_for_the_one_that_compiles(loaded, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS_BETWEEN_MOVES", 0.01)
    moved = threading.Event()
    monkeypatch.setattr(distributed, "moved", moved.set)
    monkeypatch.setattr(distributed, "gather_objects", lambda said: [said] * moved.wait(30))
    assert compiled_ops.load("SomeOp") is None
    assert moved.is_set()


def test_a_folder_that_others_may_write_to_is_not_trusted(loaded, tmp_path):
    private = compiled_ops._private()
    private.mkdir()
    private.chmod(0o777)
    assert "not a folder of this user alone" in compiled_ops.load("SomeOp")
    assert not loaded


def test_one_rank_that_cannot_decides_for_all(monkeypatch):
    monkeypatch.setattr(
        distributed, "gather_objects", lambda mine: [mine, ("its compiler fails", "node7"), mine]
    )
    assert compiled_ops.agreed(lambda: None) == "its compiler fails (on node7)"
