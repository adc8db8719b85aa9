"""A source archive has the same bytes, whenever and by whom it was built."""

from __future__ import annotations

import os
import runpy
import tarfile
from pathlib import Path

import pytest

DIST = Path(__file__).resolve().parents[2] / ".ci" / "dist.py"


@pytest.fixture(scope="module")
def rewrite():
    return runpy.run_path(str(DIST))["rewrite"]


def pack(folder: Path, names: list[str], *, seconds: int, owner: str) -> Path:
    """An archive of three files, as one build leaves it."""
    folder.mkdir()
    with tarfile.open(folder / "name-1.tar.gz", "w:gz") as archive:
        for name in names:
            path = folder / name
            path.write_text(f"content of {name}")
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
            os.utime(path, (seconds, seconds))
            entry = archive.gettarinfo(path, f"name-1/{name}")
            entry.uname = owner
            with path.open("rb") as data:
                archive.addfile(entry, data)
    return folder / "name-1.tar.gz"


def test_archives_of_two_builds_become_the_same(rewrite, tmp_path):
    first = pack(tmp_path / "first", ["a.py", "b.py", "run.sh"], seconds=10, owner="one")
    second = pack(tmp_path / "other", ["run.sh", "b.py", "a.py"], seconds=999, owner="other")
    assert first.read_bytes() != second.read_bytes()
    for path in (first, second):
        rewrite(path, 1_700_000_000)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        files = {entry.name: entry for entry in archive}
        assert list(files) == ["name-1/a.py", "name-1/b.py", "name-1/run.sh"]
        assert archive.extractfile("name-1/b.py").read() == b"content of b.py"
        assert {entry.mtime for entry in files.values()} == {1_700_000_000}
        assert files["name-1/run.sh"].mode == 0o755


def test_an_archive_with_another_content_stays_another(rewrite, tmp_path):
    first = pack(tmp_path / "first", ["a.py"], seconds=10, owner="one")
    second = pack(tmp_path / "other", ["b.py"], seconds=10, owner="one")
    for path in (first, second):
        rewrite(path, 0)
    assert first.read_bytes() != second.read_bytes()
