"""Checks that are made together."""

from __future__ import annotations

import time

import pytest

from fd_large.errors import (
    ConfigError,
    DataError,
    FDError,
    check_all,
    first_line,
    first_names,
    masked,
    named,
    nearest,
    without_secrets,
)


def refuse(error: FDError) -> None:
    raise error


def test_without_a_mistake_the_values_come_back_in_order() -> None:
    assert check_all(lambda: 1, lambda: None, lambda: "a") == [1, None, "a"]


def test_a_single_mistake_is_raised_as_it_is() -> None:
    error = DataError("data.root: a")
    error.agreed = True
    with pytest.raises(DataError) as caught:
        check_all(lambda: 1, lambda: refuse(error))
    assert caught.value is error


def test_all_mistakes_are_told_at_once_and_each_once() -> None:
    first, second = ConfigError("objective.loss: a"), DataError("data.root: b")
    with pytest.raises(ConfigError) as caught:
        check_all(lambda: refuse(first), lambda: refuse(second), lambda: refuse(second))
    assert str(caught.value).splitlines() == ["objective.loss: a", "data.root: b"]


def test_a_mistake_of_ours_stays_a_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        check_all(lambda: refuse(ConfigError("a")), lambda: 1 / 0)


@pytest.mark.parametrize(
    ("error", "line", "both"),
    [
        (ValueError("\n a\nb"), "a", "ValueError: a"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError(" \n"), "ValueError", "ValueError"),
    ],
)
def test_an_error_without_text_is_told_by_its_class(error, line: str, both: str) -> None:
    assert (first_line(error), named(error)) == (line, both)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("bse_lr", "nearest: base_lr"),
        ("lr", "nearest: base_lr, warmup_lr"),
        ("q", "known: base_lr, epochs, warmup_lr"),
        ("zzz", "known: base_lr, epochs, warmup_lr"),
    ],
)
def test_the_nearest_names_are_near_misses_or_contain_the_name(name: str, told: str) -> None:
    found = nearest(name, ["warmup_lr", "epochs", "base_lr"])
    assert found.startswith(told) if name == "bse_lr" else found == told


def test_the_names_are_told_as_flags() -> None:
    names = ["warmup_lr", "epochs"]
    assert nearest("epoch", names, before="--") == "nearest: --epochs"
    assert nearest("q", names, before="--") == "known: --epochs, --warmup_lr"


def test_of_many_names_the_first_are_told() -> None:
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_a_notebook_shows_the_sentence_without_frames(capsys) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns["error"] = DataError("data.root: no images; got none.")
    shell.run_cell("raise error")
    assert capsys.readouterr().out.strip() == "DataError: data.root: no images; got none."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:PW@host/x.tar?X-Sig=SIG", "https://***@host/x.tar?***"),
        ("S3://key:a@b@host/x", "S3://***@host/x"),
        ("https://u:it's@h/a.tar?b=c&d='", "https://***@h/a.tar?***'"),
        (
            "'https://h/{a,b}.tar?sig=1,2' and https://h/c?d",
            "'https://h/{a,b}.tar?***' and https://h/c?***",
        ),
        ("0.5 s3://bucket/a + 0.5 hf://me:PW@b/c", "0.5 s3://bucket/a + 0.5 hf://***@b/c"),
        (
            "Max retries exceeded with url: /x.tar?sig=SIG (Caused",
            "Max retries exceeded with url: /x.tar?*** (Caused",
        ),
        (
            "URL('https://h/x?SIG'), <https://h/y?SIG>.",
            "URL('https://h/x?***'), <https://h/y?***>.",
        ),
        ('{"a": "https://u:PW@h/?x=SIG", "b": 1}', '{"a": "https://***@h/?***", "b": 1}'),
        ("https://u:P/W@h/x, https://h:80/a@b", "https://***@h/x, https://h:80/a@b"),
        ("https://h/x#token=SIG, https://h/x#a-place", "https://h/x#***, https://h/x#a-place"),
        ("weights: https:/u:PW@h/x: no such file", "weights: https:/***@h/x: no such file"),
        ("got '//u:PW@x/y'. /a/b@c ./a//b@c", "got '//***@x/y'. /a/b@c ./a//b@c"),
        ("simplecache::https://u:PW@h/x", "simplecache::https://***@h/x"),
        ("really? yes=no, /path? It's x=1", "really? yes=no, /path? It's x=1"),
        ("me@example.org https://host/me@2x.png", "me@example.org https://host/me@2x.png"),
    ],
)
def test_user_password_and_query_of_an_address_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(DataError(text)) == shown


@pytest.mark.parametrize("text", ["https://", "a.", "/?a=", "?", "a://@", "https://h/?'", "(')"])
def test_a_long_text_is_masked_at_once(text: str) -> None:
    begin = time.process_time()
    without_secrets(text * 100_000 + " ? ://@")
    assert time.process_time() - begin < 5  # Seconds; a square of the length takes hours.


def test_values_are_masked_at_any_depth() -> None:
    found = masked({"a": ["https://u:PW@h", 1, None], "b": {"c": ("x?y=SIG",)}})
    assert found == {"a": ["https://***@h", 1, None], "b": {"c": ["x?***"]}}
