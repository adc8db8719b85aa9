"""The mistakes that `make mutate` makes, and what it says of them."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutate():
    sys.path.insert(0, str(ROOT / ".ci"))
    yield importlib.import_module("mutate")
    sys.path.remove(str(ROOT / ".ci"))


def made(mutate, text, kind):
    """Texts of one kind of mutants of a function's body, without the function's head."""
    whole = f'def f(a, b):\n    """Adds 1 + 1."""\n    if a:\n        pass\n{text}'
    mutants = [mutant for mutant in mutate.mutants_of("a.py", whole) if mutant.kind == kind]
    texts = [mutant.applied(whole) for mutant in mutants]
    assert all(ast.parse(text) for text in texts)
    return ["\n".join(new.splitlines()[4:]).strip() for new in texts if new.startswith(whole[:50])]


@pytest.mark.parametrize(
    ("kind", "line", "mutants"),
    [
        ("comparison", "return a < b", ["return (a >= b)"]),
        ("off by one", "return a < b", ["return (a <= b)"]),
        ("off by one", "return a == b", []),
        ("off by one", "return range(a, b)", ["return range(a, b - 1)"]),
        ("arithmetic", "return a // b", ["return (a * b)"]),
        ("arithmetic", 'return "a" + b', []),
        ("constant", "return True, 3, 0.5", ["return False, 3, 0.5", "return True, 4, 0.5"]),
        ("not", "return not a", ["return (a)"]),
        ("and, or", "return a and b", ["return (a or b)"]),
        ("argument dropped", "return g(a, b=b)", ["return g(a)"]),
        ("swapped arguments", "return g(a, b, 1)", ["return g(b, a, 1)"]),
        ("swapped arguments", "return isinstance(a, b)", []),
        ("swapped arguments", "return g(a, a), max(a, b), a.transpose(1, 2)", []),
        ("statement dropped", 'raise ValueError(f"{a + 1}")', ["pass"]),
        ("arithmetic", 'raise ValueError(a + 1, "é")', []),
        ("arithmetic", 'log.warning("seen", a + 1)', []),
        ("early return", "g(a)", ["return"]),
        ("early return", "return g(a)", []),
        ("arithmetic", 'é = "é"; b = a + b', ['é = "é"; b = (a - b)']),
    ],
)
def test_each_kind_of_mistake(mutate, kind, line, mutants):
    assert made(mutate, f"    {line}\n", kind)[: len(mutants) or 1] == mutants


def test_a_draw_is_the_seeds_and_takes_each_function_once_before_it_takes_one_again(mutate):
    body = "(a, b):\n    if a < b:\n        return a + 1\n    return b\n"
    texts = {
        "a.py": "".join(f"def f{number}{body}" for number in range(4)) + "def g():\n    h(1)\n"
    }
    drawn = mutate.draw(texts, 8, seed=3)
    assert drawn == mutate.draw(texts, 8, seed=3) != mutate.draw(texts, 8, seed=4)
    assert [len({m.function for m in part}) for part in (drawn[:4], drawn[4:])] == [4, 4]
    everything = mutate.draw(texts, 1000, seed=3)
    assert (
        len(set(everything)) == len(everything) == len(list(mutate.mutants_of("", texts["a.py"])))
    )


def test_survivors_are_shown_and_the_working_tree_is_left_alone(tmp_path):
    most = "def most(a, b):\n    return a if a > b else b\n"
    files = {
        "fd_large/__init__.py": "",
        "fd_large/rooms/__init__.py": "",
        "fd_large/rooms/first/most.py": most,
        "fd_large/rooms/second/red.py": "def sign(a):\n    return a < 0\n",
        "tests/unit/rooms/first/test_most.py": "from fd_large.rooms.first.most import most\n\n"
        "def test_most():\n    assert most(1, 2) == 2\n",
        "tests/unit/rooms/second/test_red.py": "def test_red():\n    assert False\n",
    }
    # Nothing here needs the libraries that the tests of the package find loaded.
    for name in ("deepspeed", "timm", "torchvision", "torchvision/transforms"):
        files[f"{name}/__init__.py"] = ""
    files["torchvision/transforms/v2.py"] = ""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    command = [sys.executable, ROOT / ".ci/mutate.py", "rooms", "--number", "99"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    ends = [line.split(": ")[1] for line in done.stdout.splitlines() if ".py:2 " in line]
    # Killed where the larger one is the second; not asked: where both are equal, or the first is.
    assert sorted(ends) == ["NOT ASKED"] * 3 + ["SURVIVED"] * 2 + ["killed by its own tests"] * 2
    assert "+    return a if (a >= b) else b" in done.stdout
    assert "+    return a if False else b" in done.stdout
    assert {name: (tmp_path / name).read_text() for name in files} == files
