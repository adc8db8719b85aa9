"""The probe's ranks: one that fails takes the others with it."""

import subprocess
import sys
import time

from fd_large.plan.probe import _ended


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_rank_that_fails_leaves_none_waiting():
    begin = time.monotonic()
    codes = _ended([started("import time; time.sleep(120)"), started("raise SystemExit(3)")])
    assert codes == [-15, 3]
    assert time.monotonic() - begin < 60
    assert _ended([started(""), started("")]) == [0, 0]
