"""Runs the tests of what the working tree changes, the nearest first.

    python .ci/changed.py [COMMIT] [PYTEST'S ARGUMENTS ...]

COMMIT is what the working tree is compared with, HEAD if it is left out. The tests of a file are
its mirror in tests/unit, the tests that import or name it, the mirrors of the files that import
it; where these are few, the tests that reach it through a helper, or else those of its folder.
No more than MOST run. Tests that start ranks run only if they, or their program, changed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

MOST, FEW = 12, 4
TREES = ("fd_large", "tests", "benchmarks", ".ci")
# Tests that read whole folders or kinds of files.
READ_ALL = {
    "fd_large/*": "tests/unit/test_house.py",
    "*.md": "tests/unit/test_pages.py",
    "slurm/*": "tests/unit/test_slurm_script.py",
}


class Importers:
    """Who imports or names each file of the repository.

    Args:
        texts: The Python files, by their paths from the root.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self._of: dict[str, set[str]] = defaultdict(set)
        for name, text in texts.items():
            for reached in _reached(text):
                self._of[reached].add(name)

    def of(self, name: str) -> set[str]:
        """Returns the files that import this one as a module, or name it in a string."""
        path = PurePosixPath(name)
        if path.parts[0] == "fd_large" and path.suffix == ".py":
            parts = path.parent.parts if path.stem == "__init__" else path.with_suffix("").parts
            return self._of[".".join(parts)] - {name}
        return (self._of[path.name] | (self._of[path.stem] if path.suffix == ".py" else set())) - {
            name
        }

    def mirror(self, name: str) -> str | None:
        """Returns the test file of a file of the package, or None if it has none."""
        path = PurePosixPath(name)
        if path.parts[0] != "fd_large":
            return None
        twin = PurePosixPath("tests/unit", *path.parts[1:-1], f"test_{path.name}").as_posix()
        return twin if twin in self.texts else None

    def tests_of(self, name: str) -> list[str]:
        """Returns the unit tests of a file, the nearest first."""
        importers = self.of(name)
        through_helpers, waiting = set(importers), [name for name in importers if _is_helper(name)]
        while waiting:
            new = self.of(waiting.pop()) - through_helpers
            through_helpers |= new
            waiting += [name for name in new if _is_helper(name)]
        groups: list[Iterable[str | None]] = [
            [name, self.mirror(name)],
            importers,
            map(self.mirror, importers),
            through_helpers,
            [test for pattern, test in READ_ALL.items() if fnmatch(name, pattern)],
        ]
        nearest: list[str] = []
        for group in groups:
            if group is through_helpers and len(nearest) >= FEW:
                continue
            tests = {test for test in group if test and _is_test(test)} - set(nearest)
            nearest += sorted(tests, key=lambda test: (-_common(test, name), test))
        if len(nearest) < 2 and name.startswith("fd_large/"):
            folder = PurePosixPath("tests/unit", *PurePosixPath(name).parts[1:-1]).as_posix()
            inside = [test for test in self.texts if _is_test(test)]
            nearest = [test for test in inside if test.startswith(f"{folder}/")] + nearest
        return nearest


def tests_of_all(changed: list[str], importers: Importers) -> list[str]:
    """Returns the tests of all changed files, each file's nearest before any one's second."""
    lists = [
        [name] if PurePosixPath(name).name.startswith("test_") else importers.tests_of(name)
        for name in changed
    ]
    lists += [
        sorted(test for test in importers.of(name) if test.startswith("tests/integration/test_"))
        for name in changed
        if name.startswith("tests/integration/programs/")
    ]
    ranked = [test for rank in range(max(map(len, lists), default=0)) for test in _at(lists, rank)]
    return list(dict.fromkeys(test for test in ranked if test in importers.texts))


def read_tree(root: Path) -> dict[str, str]:
    """Returns the Python files of the repository, by their paths from its root."""
    files = [path for tree in TREES for path in sorted((root / tree).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in files}


def main(arguments: list[str]) -> int:
    """Runs the tests; returns pytest's exit code, or 0 if nothing changed."""
    own = bool(arguments) and not arguments[0].startswith("-")
    commit, more = (arguments[0], arguments[1:]) if own else ("HEAD", arguments)
    changed = _lines("git", "diff", "--name-only", "--relative", commit, "--") + _lines(
        "git", "ls-files", "--others", "--exclude-standard"
    )
    tests = tests_of_all(changed, Importers(read_tree(Path())))
    print(f"{len(changed)} changed files against {commit}, {len(tests)} files of tests", flush=True)
    if tests[MOST:]:
        print(f"The nearest {MOST} run; left to `make test`: {', '.join(tests[MOST:])}", flush=True)
    if not tests:
        return 0
    command = [sys.executable, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile"]
    return subprocess.run([*command, *more, *tests[:MOST]], check=False).returncode


# ------------------------------------------------------------------------------------------------


def _reached(text: str) -> set[str]:
    """Modules that a file imports, and files that it names, such as programs and pages."""
    reached: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            reached |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            reached |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = PurePosixPath(node.value[:200]).name
            if "." in named and " " not in node.value:
                reached.add(named)
    return reached


def _is_helper(name: str) -> bool:
    return name.startswith(("tests/support/", "tests/oracles/", "tests/unit/")) and not _is_test(
        name
    )


def _is_test(name: str) -> bool:
    return name.startswith("tests/unit/") and PurePosixPath(name).name.startswith("test_")


def _common(test: str, name: str) -> int:
    """Number of folders, from the top, that a test and a file of the package share."""
    folders = zip(PurePosixPath(test).parts[2:-1], PurePosixPath(name).parts[1:-1], strict=False)
    same = [one == other for one, other in folders]
    return [*same, False].index(False)


def _at(lists: list[list[str]], rank: int) -> list[str]:
    return [tests[rank] for tests in lists if rank < len(tests)]


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
