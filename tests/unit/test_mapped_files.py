"""A mapped file that is cut or written over: a sentence; what is no such file: as it always was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fd_large import mapped_files
from fd_large.errors import WeightsError

SIZE = 1 << 16


class Model:
    """What holds weights."""


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"1" * SIZE)
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def model(weights):
    mapped_files.opening(weights)
    model = Model()
    mapped_files.hold(model, [weights])
    return model


def test_a_file_that_stays_and_one_that_is_replaced_or_removed_are_no_change(weights, model):
    mapped_files.check(model)
    weights.with_name("new").write_bytes(b"2")
    weights.with_name("new").rename(weights)
    mapped_files.check(model)
    weights.unlink()
    mapped_files.check(model)


@pytest.mark.parametrize("change", [b"2" * SIZE, b"", b"1" * (2 * SIZE)])
def test_a_file_that_is_written_over_is_refused(weights, model, change):
    weights.write_bytes(change)
    with pytest.raises(WeightsError, match=str(weights)) as refused:
        mapped_files.check(model)
    assert (refused.value.exit_code, refused.value.rank_local) == (3, True)
    # Models of other files, and models of this one as it is now, are none the worse.
    other = Model()
    mapped_files.check(other)
    mapped_files.opening(weights)
    mapped_files.hold(other, [weights])
    mapped_files.check(other)


PROGRAM = """
import mmap, os, sys
from pathlib import Path
import torch
from fd_large import mapped_files
from fd_large.ranks import failures

torch.set_num_threads(2)
noted, path = sys.argv[1] == "noted", Path(sys.argv[2])
size = path.stat().st_size
if noted:
    mapped_files.opening(path)
else:
    mapped_files.opening(path.with_name("other"))
failures.last_words.append(lambda reason: print("reason:", reason, flush=True))
numbers = torch.from_file(str(path), shared=False, size=size // 4).view(-1, 1024)
os.truncate(path, 0)
(torch.ones(64, numbers.shape[0]) @ numbers).sum()
"""


@pytest.mark.parametrize(("noted", "code"), [("noted", 3), ("unknown", -signal.SIGBUS)])
def test_pages_that_are_gone_end_the_process(noted, code, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * (1 << 24))
    path.with_name("other").write_bytes(b"others")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, noted, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == code, done.stderr
    assert (str(path) in done.stdout) == (noted == "noted")
