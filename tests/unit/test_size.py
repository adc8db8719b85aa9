"""The lines that `make size` counts."""

import runpy
from pathlib import Path

import pytest

SIZE = Path(__file__).resolve().parents[2] / ".ci" / "size.py"


@pytest.fixture(scope="module")
def size():
    return runpy.run_path(str(SIZE))


def test_docstrings_comments_and_blanks_are_no_code(size):
    text = '"""A docstring\n\nof three lines."""\n\nimport os  # why\nfrom a import (\n    b,\n)\n'
    text += (
        '# a comment\n\n\ndef f():\n    """One."""\n    text = """two\nlines"""\n    return text\n'
    )
    counts = size["size_of"](text)
    assert (counts.code, counts.imports, counts.long) == (8, 4, 0)
    assert size["size_of"]("def f():\n" + "    a = 1\n" * 60).long == 1


def test_a_file_of_the_package_knows_who_imports_it(size):
    texts = {
        "fd_large/a/b.py": "",
        "fd_large/c.py": "from fd_large.a import b\nimport fd_large.d\n",
        "fd_large/d.py": "from fd_large.a.b import thing\nfrom fd_large.d import itself\n",
    }
    importers = size["imported_by"](texts)
    assert importers["fd_large/a/b.py"] == {"fd_large/c.py", "fd_large/d.py"}
    assert importers["fd_large/d.py"] == {"fd_large/c.py"}


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("fd_large/files.py", "fd_large/*.py"),
        ("fd_large/engine/zero/config.py", "engine"),
        ("fd_large/tasks/depth/job.py", "tasks/depth"),
        ("fd_large/tasks/registry.py", "tasks"),
        ("tests/unit/test_size.py", "tests"),
    ],
)
def test_the_room_of_a_file(size, name, room):
    assert size["room_of"](name) == room
