"""Names of datasets: what they mean, and what is refused before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from contextlib import contextmanager

import pytest

from fd_large.cli.main import main
from fd_large.data import roots
from fd_large.data.photographs import SETS
from fd_large.data.roots import check_packages, expand_braces, is_url, require_dataset
from fd_large.data.source import open_images
from fd_large.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden").touch()
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "one.jpg").touch()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "notes.tar").write_text("notes")
    (tmp_path / "nothing.tar").touch()
    (tmp_path / "one.parquet").touch()
    for name in ("whole.tar", "without.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            if name == "whole.tar":
                archive.add(tmp_path / "images", "images")
    return tmp_path


@pytest.mark.parametrize("root", ["images", "whole.tar", "without.tar", "one.parquet", "gone"])
def test_what_may_be_a_dataset_passes(folder, root):
    require_dataset(f"{folder}/{root}", where="data.root")
    require_dataset(f"0.5 {folder}/images + 0.5 b={folder}/{root}", where="data.root")


@pytest.mark.parametrize(
    "root", [*SETS, "s3://bucket/x", "module:x.py:Y", "train-{00..09}.tar", "a word"]
)
def test_what_is_no_path_passes(root):
    require_dataset(root, where="data.root")


@pytest.mark.parametrize("root", ["empty", "notes.txt", "notes.tar", "nothing.tar"])
def test_a_path_without_images_is_refused(folder, root):
    with pytest.raises(DataError, match=r"^eval\.root: .*--eval\.root"):
        require_dataset(f"{folder}/{root}", where="eval.root")
    with pytest.raises(DataError, match=r"^data\.root \(b\): "):
        require_dataset(f"0.5 {folder}/images + 0.5 b={folder}/{root}", where="data.root")


@pytest.mark.parametrize(
    ("root", "part"),
    [
        ("", "got ''"),
        ("builtin:photograph", "nearest: builtin:photographs"),
        ("biultin:photographs", "nearest: builtin:"),
        ("mist.py:run", "expected module:mist.py:run"),
    ],
)
def test_a_name_of_nothing_is_refused(root, part):
    with pytest.raises((DataError, ConfigError), match=r"^data\.root: ") as caught:
        require_dataset(root, where="data.root")
    assert part in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_not_called_empty(folder, monkeypatch):
    def refusing(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refusing)
    require_dataset(f"{folder}/empty", where="data.root")


def test_of_many_files_one_is_looked_at(folder, monkeypatch):
    scandir, taken = os.scandir, []

    @contextmanager
    def counting(path):
        with scandir(path) as entries:
            yield map(lambda entry: taken.append(entry.name) or entry, entries)

    for number in range(100):
        (folder / "images" / "a" / f"{number}.jpg").touch()
    monkeypatch.setattr("os.scandir", counting)
    require_dataset(f"{folder}/images", where="data.root")
    assert len(taken) == 2


def test_links_to_folders_are_followed_and_circles_end(folder):
    (folder / "linked").mkdir()
    (folder / "linked" / "a").symlink_to(folder / "images")
    require_dataset(f"{folder}/linked", where="data.root")
    (folder / "empty" / "again").symlink_to(folder / "empty")
    require_dataset(f"{folder}/empty", where="data.root")


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
    monkeypatch.setattr(roots, "product", None)
    with pytest.raises(DataError, match=r"^eval\.root: ") as refused:
        expand_braces(pattern, where="eval.root")
    assert len(str(refused.value)) < 600


def test_the_command_tells_it_before_torch(capsys):
    words = ["train", "--deepspeed_config", "zero3", "--data.root", "shards/{0..999999999}.tar"]
    assert main(words) == 2
    assert "data.root" in capsys.readouterr().err


def test_urls_and_paths_are_told_apart():
    assert is_url("s3://b/x")
    for path in ("/a/b://x", "C:/x", "builtin:photographs", "module:a.py:b", "train-{0..3}.tar"):
        assert not is_url(path)
        check_packages(path, where="data.root")


def test_a_client_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"data\.root: .*'zzz://a'"):
        check_packages("zzz://a", where="data.root")
    fsspec = pytest.importorskip("fsspec")
    fsspec.register_implementation("missing", "no_such_module.Class", errtxt="none")
    with pytest.raises(DataError, match=r"missing://.* pip install fsspec"):
        check_packages("missing://a", where="data.root")


def test_a_missing_package_is_said_before_torch_is_imported(monkeypatch, tmp_path):
    for name in roots.SAVED:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(roots, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"eval\.root: .* pip install pyarrow"):
        check_packages("a/*.parquet", where="eval.root")
    with pytest.raises(DataError, match=r"pip install datasets"):
        check_packages(str(tmp_path), where="data.root")
    program = "import sys, fd_large.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=300).returncode == 0


@pytest.mark.parametrize(
    "root",
    [
        "reference://a.tar",
        "reference://a.tar::file:///a.json",
        "s3://bucket/a.tar::file:///a.json",
        "dask://host/a.tar",
    ],
)
def test_a_url_that_a_file_says_how_to_read_is_refused(root):
    """fsspec fills such a file's templates, which may call anything."""
    with pytest.raises(DataError, match=r"data\.root"):
        check_packages(root, where="data.root")
    with pytest.raises(DataError, match=r"data\.root"):
        open_images(root)


def test_a_pyarrow_that_runs_what_a_schema_holds_is_refused(monkeypatch):
    monkeypatch.setattr(roots, "version", lambda name: "14.0.0")
    with pytest.raises(DataError, match=r"14\.0\.0"):
        check_packages("a/*.parquet", where="data.root")
