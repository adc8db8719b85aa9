"""The tests that `make test-changed` finds for a file."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    "fd_large/engine/loop.py": "from fd_large.engine import clock\n",
    "fd_large/engine/clock.py": "",
    "fd_large/engine/lonely.py": "",
    "fd_large/plan/costs.py": "def later():\n    import fd_large.engine.loop\n",
    "tests/support/ranks/starts.py": "from fd_large.engine.loop import run\n",
    "tests/unit/engine/test_loop.py": "",
    "tests/unit/engine/test_clock.py": "",
    "tests/unit/plan/test_costs.py": "",
    "tests/unit/test_others.py": "import starts\n",
    "tests/unit/test_readers.py": "import fd_large.engine.loop\nGUIDE = 'docs/guide.html'\n",
    "tests/unit/test_house.py": "",
    "tests/unit/test_pages.py": "",
    "tests/integration/programs/hops.py": "",
    "tests/integration/test_hops.py": "PROGRAM = 'hops.py'\n",
}


@pytest.fixture(scope="module")
def changed():
    sys.path.insert(0, str(ROOT / ".ci"))
    yield importlib.import_module("changed")
    sys.path.remove(str(ROOT / ".ci"))


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        # The mirror, who imports it, the mirror of who imports it, and through a helper.
        (
            "fd_large/engine/loop.py",
            "engine/test_loop test_readers plan/test_costs test_others test_house",
        ),
        ("fd_large/engine/clock.py", "engine/test_clock engine/test_loop test_house"),
        ("fd_large/engine/lonely.py", "engine/test_loop engine/test_clock test_house"),
        ("tests/support/ranks/starts.py", "test_others"),
        ("tests/unit/test_others.py", "test_others"),
        ("docs/guide.html", "test_readers"),
        ("docs/page.md", "test_pages"),
        ("docs/unnamed.html", ""),
    ],
)
def test_the_tests_of_a_file_from_the_nearest(changed, name, tests):
    found = changed.tests_of_all([name], changed.Importers(TEXTS))
    assert found == [f"tests/unit/{test}.py" for test in tests.split()]


def test_each_changed_file_has_its_nearest_test_first(changed):
    names = ["fd_large/engine/loop.py", "fd_large/engine/clock.py", "tests/unit/test_gone.py"]
    found = changed.tests_of_all(names, changed.Importers(TEXTS))
    assert found[:2] == ["tests/unit/engine/test_loop.py", "tests/unit/engine/test_clock.py"]
    assert len(set(found)) == len(found) == 6


def test_ranks_start_only_if_their_test_or_program_changed(changed):
    importers = changed.Importers(TEXTS)
    for name in ("tests/integration/programs/hops.py", "tests/integration/test_hops.py"):
        assert changed.tests_of_all([name], importers) == ["tests/integration/test_hops.py"]


def test_helpers_lead_to_tests_where_there_are_few_nearer_ones(changed, monkeypatch):
    monkeypatch.setattr(changed, "FEW", 3)
    found = changed.tests_of_all(["fd_large/engine/loop.py"], changed.Importers(TEXTS))
    assert found == [
        f"tests/unit/{test}.py"
        for test in ("engine/test_loop", "test_readers", "plan/test_costs", "test_house")
    ]
