"""Code of the user's own is found, imported only where it is allowed, and refused in a sentence."""

from __future__ import annotations

import hashlib
import pickle
import py_compile
import sys
from pathlib import Path

import pytest
from plugins import install

from fd_large import allowed_code, doors
from fd_large.errors import ConfigError

WHERE = "objective.loss"


def written(path: Path, text: str = "def cosine():\n    return 1\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"module:{path}:cosine"


def load(source: str) -> object:
    return doors.load(source, kind="losses", where=WHERE, built_in={"smooth_l1": 7})


def allowed(source: str) -> object:
    doors.allow(source)
    return load(source)


def refused(source: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert all(part in str(caught.value) for part in (WHERE, *parts)), caught.value
    assert "\n" not in str(caught.value)


def test_what_the_users_code_raises_has_a_place_in_their_file(tmp_path: Path) -> None:
    text = "import torch\ndef cosine():\n    torch.zeros(2) @ torch.zeros(3)\n"
    cosine = allowed(written(tmp_path / "mine.py", text))
    with pytest.raises(RuntimeError) as caught:
        cosine()
    said = doors.cause(caught.value)
    assert said.startswith("RuntimeError: ")
    assert said.endswith(f" in {tmp_path}/mine.py line 3")
    assert doors.cause(ValueError("a\nb")) == "ValueError: a"
    assert doors.cause(AssertionError()) == "AssertionError"


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    source = written(tmp_path / "mine.py")
    assert allowed(source)() == 1
    written(tmp_path / "mine.py", "cosine = 2\n")
    assert load(source)() == 1


def test_a_built_in_name_needs_no_permission() -> None:
    assert load("smooth_l1") == 7


def test_a_file_that_was_not_allowed_is_not_imported(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"open({str(marker)!r}, 'w').close()\ncosine = 1\n"
    source = written(tmp_path / "mine.py", text)
    doors.allow(tmp_path / "other.py")
    refused(source, f"add --allow-code {tmp_path / 'mine.py'}.")
    assert not marker.exists()
    assert allowed(source) == 1
    assert marker.exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def cosin(): pass\n", ["'cosine'", "nearest: cosin"]),
        ("import no_such_package\n", ["ModuleNotFoundError", "no_such_package", "mine.py line 1"]),
        ("x = 1\ndef cosine(:\n", ["SyntaxError", "mine.py line 2"]),
        ("x = 1\ny = 1 / 0\n", ["ZeroDivisionError", "mine.py line 2"]),
        ("import json\njson.loads('{')\n", ["JSONDecodeError", "mine.py line 2"]),
    ],
    ids=["name", "import", "syntax", "error", "library"],
)
def test_what_is_wrong_in_a_file_is_one_sentence(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    source = written(tmp_path / "mine.py", text)
    doors.allow(source)
    refused(source, *parts)


def test_a_wrong_name_is_answered_by_what_the_file_itself_defines(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
try:
    scale, shift = torch.ones(2)
except ValueError as error:
    limit = 1
class Net(nn.Module):
    width = 3
    def forward(self, images):
        hidden = [i for i in images]
        return hidden
_private = [n for n in range(3)]
if nn:
    depth: int = 2
    def qqq(argument): pass
"""
    source = written(tmp_path / "mine.py", text)
    known = "known: Net, depth, limit, qqq, scale, shift. "
    assert known in doors.complaint(source, WHERE)
    text = text.replace("scale, shift = torch.ones(2)", "vars()['scale'], shift = 1, 2")
    source = written(tmp_path / "other.py", text)
    doors.allow(source)
    refused(source, "known: Net, depth, limit, qqq, shift. ")
    assert "nearest: cosin. " in doors.complaint(
        written(tmp_path / "third.py", "import cosines\ndef cosin(cosine_of): pass\n"), WHERE
    )
    source = written(tmp_path / "imports.py", "from math import pi, tau\n")
    assert "known: pi, tau. " in doors.complaint(source, WHERE)


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    for source in (f"module:{tmp_path}/no.py:cosine", "module:no_package.no_module:cosine"):
        doors.allow(source)
        refused(source, "no such file")
    refused("module:no_name", "incomplete")
    refused("module:mine.py:", "incomplete")
    refused("smooth_l2", "nearest: smooth_l1", "module:")
    for bare in (f"{tmp_path}/no.py:cosine", "package.module:cosine"):
        refused(bare, f"module:{bare}")
    refused("no.py", "module:no.py:NAME")


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    one = allowed(written(tmp_path / "a" / "mine.py", "class cosine:\n    at = 1\n"))
    two = allowed(written(tmp_path / "b" / "mine.py", "class cosine:\n    at = 2\n"))
    assert (one.at, two.at) == (1, 2)
    assert pickle.loads(pickle.dumps(two)) is two


def test_a_relative_path_starts_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert doors.absolute("module:mine.py:cosine") == f"module:{tmp_path}/mine.py:cosine"
    assert allowed("module:mine.py:cosine")() == 1
    for other in ("smooth_l1", "module:package.module:cosine", "/a/mine.py", ""):
        assert doors.absolute(other) == other


def test_a_module_on_the_path_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    written(tmp_path / "own_package" / "__init__.py", f"open({str(marker)!r}, 'w').close()\n")
    written(tmp_path / "own_package" / "mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    source = "module:own_package.mine:cosine"
    assert doors.file_of(source) == tmp_path / "own_package" / "mine.py"
    assert doors.hashes([source])[source]
    refused(source, "--allow-code")
    assert not marker.exists()
    assert allowed(source)() == 1
    for name in ("own_package", "own_package.mine"):
        monkeypatch.delitem(sys.modules, name)


def test_an_entry_point_of_an_installed_package_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "plugin_of_a_test.py")
    install(
        tmp_path,
        "losses",
        "cosine = plugin_of_a_test:cosine",
        "lost = plugin_of_a_test:lost",
        "gone = no_module_of_a_test:gone",
        "needs = needs_of_a_test:needs",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doors.hashes({"loss": "cosine", "beta": 2.0}) == {
        "cosine": hashlib.sha256((tmp_path / "plugin_of_a_test.py").read_bytes()).hexdigest()
    }
    assert load("cosine")() == 1
    refused("lost", "fd_large.losses", "AttributeError")
    refused("gone", "ModuleNotFoundError", "no_module_of_a_test:gone")
    written(tmp_path / "needs_of_a_test.py", "x = 1\nimport no_such_package\n")
    refused("needs", "no_such_package", "needs_of_a_test.py line 2")
    refused("cosin", "nearest: cosine")
    with pytest.raises(ConfigError):
        doors.load("cosine", kind="trackers", where=WHERE)
    monkeypatch.delitem(sys.modules, "plugin_of_a_test")


def test_a_command_line_allows_what_it_names(tmp_path: Path) -> None:
    one, two, three = (written(tmp_path / f"{name}.py") for name in "abc")
    doors.allow_named(["train", "--objective.loss", one, f"--optim.name={two}", "--x", "no"])
    assert load(one)() == load(two)() == 1
    refused(three, "--allow-code")


def test_words_of_a_run_folder_allow_nothing(tmp_path: Path) -> None:
    source = written(tmp_path / "a.py")
    words = [name.replace("module:", doors.UNNAMED) for name in (source, f"--x={source}")]
    doors.allow_named(words)
    assert doors.plain_names(words) == [source, f"--x={source}"]
    refused(source, "--allow-code")


def new_start(*arguments: str) -> None:
    """A process that knows nothing of those before, with a command line."""
    doors.reset()
    doors.allow_named(arguments, remember=True)


def test_a_name_allows_no_other_of_its_file(tmp_path: Path) -> None:
    text = "from subprocess import run\ndef cosine():\n    return 1\n"
    source = written(tmp_path / "mine.py", text)
    assert allowed(source)() == 1
    other = source.replace(":cosine", ":run")
    assert not doors.is_allowed(other)
    refused(other, "--allow-code")
    doors.allow(tmp_path / "mine.py")
    assert load(other)


def test_what_a_start_named_needs_no_flag_until_it_changes(tmp_path: Path) -> None:
    source = written(tmp_path / "mine.py", "cosine = 1\nother = 2\n")
    new_start("train", "--objective.loss", source)
    assert load(source) == 1
    new_start("train")
    assert load(source) == 1
    refused(source.replace(":cosine", ":other"), "--allow-code")
    written(tmp_path / "mine.py", "cosine = 3\nother = 2\n")
    assert load(source) == 1, "what runs is what was allowed"
    new_start("train")
    refused(source, "--allow-code")
    doors.allow(tmp_path / "mine.py")
    assert load(source) == 3
    new_start("train")
    assert load(source) == 3
    written(tmp_path / "mine.py", "cosine = 1\nother = 2\n")
    new_start("train")
    assert load(source) == 1, "the hashes of before stay"


def test_a_copy_of_allowed_code_elsewhere_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text imports other files there, and a link to it is the file itself."""
    source = written(tmp_path / "mine" / "own_losses.py")
    written(tmp_path / "foreign" / "own_losses.py")
    dotted = "module:own_losses:cosine"
    with monkeypatch.context() as mine:
        mine.syspath_prepend(tmp_path / "mine")
        new_start("train", source, dotted)
        assert load(source)() == load(dotted)() == 1
        new_start("train")
        sys.modules.pop("own_losses", None)
        assert load(dotted)() == 1
    sys.modules.pop("own_losses", None)
    new_start("train")
    (tmp_path / "link.py").symlink_to(tmp_path / "mine" / "own_losses.py")
    assert load(f"module:{tmp_path}/link.py:cosine")() == 1
    refused(f"module:{tmp_path}/foreign/own_losses.py:cosine", "--allow-code")
    monkeypatch.syspath_prepend(tmp_path / "foreign")
    refused(dotted, "--allow-code", str(tmp_path / "foreign"))


@pytest.mark.parametrize("dotted", [False, True])
def test_a_file_that_changes_before_its_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dotted: bool
) -> None:
    source = written(tmp_path / "changing.py")
    if dotted:
        monkeypatch.syspath_prepend(tmp_path)
        source = "module:changing:cosine"
    new_start("train", source)
    assert load(source)() == 1
    new_start("train")
    sys.modules.pop("changing", None)
    assert doors.is_allowed(source)
    marker = tmp_path / "ran"
    written(tmp_path / "changing.py", f"open({str(marker)!r}, 'w')\ncosine = 1\n")
    refused(source, "--allow-code")
    assert not marker.exists()


def test_a_cached_compilation_of_another_text_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cached.py"
    written(path, "cosine = 2\n")
    py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    written(path, "cosine = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert allowed("module:cached:cosine") == 1
    monkeypatch.delitem(sys.modules, "cached")


def test_a_process_that_starts_another_hands_on_what_it_may_import(tmp_path: Path) -> None:
    source, edited = written(tmp_path / "mine.py"), written(tmp_path / "edited.py")
    checked = doors.hashes([source, edited])
    written(tmp_path / "edited.py", "cosine = 2\n")
    new_start()
    doors.allow_unchanged(checked)
    assert load(source)() == 1
    refused(edited, "--allow-code")
    new_start()
    refused(source, "--allow-code")


@pytest.mark.parametrize(
    "source",
    [
        "module:a\0b.py:x",
        "module:~no-such-user/a.py:x",
        f"module:{'a' * 300}.py:x",
        "module:/dev/zero/a.py:x",
        "module:builtins:eval",
        "module:os.path.:x",
        "module:..:x",
        "module:/:x",
    ],
)
def test_impossible_names_are_sentences(source: str) -> None:
    doors.allow(source)
    assert not doors.is_allowed(source)
    refused(source)
    assert doors.hashes([source]) == {source: ""}


def test_a_link_that_leads_back_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    refused(f"module:{tmp_path}/loop.py:x", "symbolic links")


def test_a_list_that_is_not_believed_is_said_where_code_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "mine.py")
    new_start(source)
    assert load(source)
    new_start()
    place = allowed_code.place()
    assert place is not None
    place.chmod(0o666)
    with pytest.raises(ConfigError, match="0666"):
        load(source)


def test_hashes_are_of_the_files_that_a_recipe_names(tmp_path: Path) -> None:
    source, gone = written(tmp_path / "mine.py"), f"module:{tmp_path}/gone.py:x"
    recipe = {"objective": {"loss": source, "beta": 2.0}, "trackers": ["tensorboard", gone]}
    digest = hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    assert doors.hashes(recipe) == {source: digest, gone: ""}
    allowed(source)
    written(tmp_path / "mine.py", "cosine = 2\n")
    assert doors.hashes(recipe)[source] == digest, "of what runs"
