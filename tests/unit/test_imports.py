"""Packages are left out of an import for that long; what stays is no concern of collections."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large import imports
from fd_large.imports import for_good, without


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


def test_what_stays_is_hidden_from_collections_once(tmp_path, monkeypatch):
    (tmp_path / "staying.py").write_text("value = [[] for _ in range(100)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with for_good("staying"):
            assert not gc.isenabled()
            import staying
        assert gc.isenabled()
        # `gc.get_objects` leaves out what is hidden.
        assert not any(one is staying.value for one in gc.get_objects())
        later = [[]]
        with for_good("staying"):
            assert gc.isenabled()
        # A second import hides nothing.
        assert any(one is later for one in gc.get_objects())
        with pytest.raises(ImportError), for_good("missing"):
            import missing  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        del sys.modules["staying"]


def test_the_interpreter_ends_without_a_word():
    pytest.importorskip("triton")
    lines = ("from fd_large.imports import for_good", "with for_good('triton'): import triton")
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("program", [["-m", "fd_large"], ["-m", "fd_large.train"]])
@pytest.mark.parametrize("named", [False, True], ids=["", "PYTHONPATH"])
@pytest.mark.parametrize("form", ["{}", ":{}", "{}:"])
def test_a_file_of_the_current_folder_stands_in_for_no_module(tmp_path, program, named, form):
    """Unless PYTHONPATH says so, which the user has set."""
    for name in ("yaml", "tyro", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    package = str(Path(imports.__file__).parents[1])
    paths = [str(tmp_path), package] if named else [package]
    environ = {**os.environ, "PYTHONPATH": form.format(os.pathsep.join(paths))}
    environ.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=tmp_path, env=environ, capture_output=True
    )
    assert (tmp_path / "ran").exists() == named
    assert named or not done.returncode
