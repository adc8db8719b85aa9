"""Words from elsewhere in Markdown and in the YAML on its top."""

from __future__ import annotations

import pytest
import yaml

from fd_large.markdown import code, escaped, head

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b",
    "![x](http://127.0.0.1/pixel.png)",
    "[x](javascript:alert(1))",
    "a\n\n# heading\n---",
    "`code` *strong* &lt;",
    "\\<b>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_text_is_markup(text):
    for line in (escaped(text), code(text)):
        assert "\n" not in line
        # Not even behind a backslash of its own.
        assert line.replace("\\\\", "").count("|") == line.replace("\\\\", "").count("\\|")
    plain = escaped(text).replace("\\\\", "")
    assert "<" not in plain
    for mark in "[]*`":
        assert plain.count(mark) == plain.count(f"\\{mark}")
    assert code(text).count("`") == 2


def test_names_stay_readable():
    assert escaped("fd_clip_vit_base, (2, 4), 0.5 - 1") == "fd_clip_vit_base, (2, 4), 0.5 - 1"
    assert code("hf:a/b") == "`hf:a/b`"


@pytest.mark.parametrize("text", [*HOSTILE, "a: b", "- a", "x\n---\ny: 1", "no", "\u2028", "\x00"])
def test_a_head_holds_the_values_and_nothing_else(text):
    values = {"license": text, "base_model": [text, "a/b"]}
    page = head(values) + "\n\n# title\n"
    assert page.startswith("---\n")
    # As readers of cards find it: up to the first line of dashes.
    body, _, rest = page[4:].partition("\n---\n")
    assert yaml.safe_load(body) == values
    assert rest == "\n# title\n"
