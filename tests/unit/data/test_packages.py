from __future__ import annotations

import subprocess
import sys

import pytest

from fd_large.data import packages
from fd_large.data.packages import check_packages, is_url
from fd_large.data.source import open_images
from fd_large.errors import DataError


def test_urls_and_paths_are_told_apart():
    assert is_url("s3://b/x")
    for path in ("/a/b://x", "C:/x", "builtin:photographs", "module:a.py:b", "train-{0..3}.tar"):
        assert not is_url(path)
        check_packages(path, where="data.root")


def test_a_client_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"data\.root: no such kind of URL; got 'zzz://a'"):
        check_packages("zzz://a", where="data.root")
    fsspec = pytest.importorskip("fsspec")
    fsspec.register_implementation("missing", "no_such_module.Class", errtxt="none")
    with pytest.raises(DataError, match=r"missing:// needs a package .* pip install fsspec"):
        check_packages("missing://a", where="data.root")


def test_a_missing_package_is_said_before_torch_is_imported(monkeypatch, tmp_path):
    for name in packages.SAVED:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"eval\.root: parquet files: .* pip install pyarrow"):
        check_packages("a/*.parquet", where="eval.root")
    with pytest.raises(DataError, match=r"a saved dataset: .* pip install datasets"):
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
    monkeypatch.setattr(packages, "version", lambda name: "14.0.0")
    with pytest.raises(DataError, match=r"14\.0\.0"):
        check_packages("a/*.parquet", where="data.root")
