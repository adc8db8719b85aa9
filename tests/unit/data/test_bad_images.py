from __future__ import annotations

import logging

import pytest

from fd_large.data.bad_images import BadCount, BadImages, limit_error, past_limit


@pytest.mark.parametrize(
    ("num_bad", "num_tried", "fraction", "past"),
    [
        (0, 0, 0.01, False),
        (1, 10, 0.01, False),  # a tenth of the first ten is no tenth
        (10, 20, 0.01, False),
        (11, 20, 0.01, True),
        (11, 1100, 0.01, False),
        (12, 1100, 0.01, True),
        (0, 50, 0.0, False),
        (1, 50, 0.0, True),
        (1000, 1000, 0.5, True),
    ],
)
def test_the_limit_is_a_fraction_with_a_floor(num_bad, num_tried, fraction, past):
    assert past_limit(BadCount(num_bad, num_tried), fraction) is past


def test_every_bad_sample_counts_and_each_name_is_logged_once(caplog):
    pictures = BadImages()
    with caplog.at_level(logging.WARNING):
        pictures.add(8, ())
        pictures.add(8, ("a/b.jpg: not an image; got x.", "c.jpg: too large; got y."))
        pictures.add(8, ("a/b.jpg: not an image; got x.",))
    assert pictures.count == BadCount(3, 27)
    assert pictures.names == ["a/b.jpg", "c.jpg"]
    assert [record.message for record in caplog.records] == [
        "skipped: a/b.jpg: not an image; got x.",
        "skipped: c.jpg: too large; got y.",
    ]


def test_the_end_of_a_run_has_the_list_in_one_sentence():
    text = str(limit_error(BadCount(30, 900), 0.01, ["b.jpg", "a.jpg", "b.jpg"]))
    assert "got 30 of 900 samples, expected at most 0.01 of them (of 1,000 " in text
    assert ": a.jpg, b.jpg. " in text
    assert "--data.max_bad_fraction" in text
    assert "\n" not in text
    many = str(limit_error(BadCount(30, 900), 0.01, [f"{i:03}.jpg" for i in range(30)]))
    assert "019.jpg and 10 more (see the log)" in many
