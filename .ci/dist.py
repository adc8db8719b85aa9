"""Wheel and source archive of the last commit in dist/, built twice to the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PLAIN_MODES = ("-c", "tar.umask=0022")
"""Root keeps the modes that an archive has, and others take away their umask: now they agree."""


def build(out: Path, commit: str) -> dict[str, str]:
    """Builds both from a copy of a commit; returns each file's hash by its name."""
    seconds = git("show", "--no-patch", "--format=%ct", commit).decode().strip()
    environ = {**os.environ, "SOURCE_DATE_EPOCH": seconds}
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    with TemporaryDirectory() as folder:
        subprocess.run(
            ["tar", "x"], cwd=folder, input=git(*PLAIN_MODES, "archive", commit), check=True
        )
        done = subprocess.run(
            [*words, folder], env=environ, umask=0o022, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"dist: the build failed.\n{done.stdout}{done.stderr}")
    for archive in out.glob("*.tar.gz"):
        rewrite(archive, int(seconds))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def git(*words: str) -> bytes:
    """Output of git in this repository."""
    # In a container the checkout may belong to another user.
    trusted = ("git", "-c", f"safe.directory={ROOT}")
    return subprocess.run([*trusted, *words], cwd=ROOT, capture_output=True, check=True).stdout


def rewrite(archive: Path, seconds: int) -> None:
    """Gives all files of an archive one time and owner: setuptools leaves those of the build."""
    with tarfile.open(archive) as built:
        files = [(file, built.extractfile(file)) for file in built if file.isfile()]
        contents = {file.name: (file, data.read()) for file, data in files if data}
    # Else gzip's header has the archive's name and the time of the build.
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=seconds) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as rewritten,
    ):
        for name, (file, data) in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(data), seconds, file.mode
            rewritten.addfile(entry, io.BytesIO(data))


def main(commit: str = "HEAD") -> None:
    """Builds twice and compares; ends with exit code 1 if a byte differs."""
    with TemporaryDirectory() as first:
        expected = build(Path(first), commit)
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    for path in out.iterdir():
        path.unlink()
    found = build(out, commit)
    if found != expected:
        raise SystemExit(f"dist: two builds of {commit} differ: {expected}, then {found}.")
    for name, digest in sorted(found.items()):
        print(f"{digest}  dist/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
