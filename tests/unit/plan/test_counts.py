"""Counts as data: lines through two counts, the highest of several."""

import random

from fd_large.plan.counts import Line, grouped, highest, sizes, through


def test_a_line_through_two_counts():
    line = through(30, 50, (2, 4))
    assert line == Line(10, 10)
    assert [line.at(n) for n in (1, 8)] == [20, 90]
    assert line + Line(1, 2) == Line(11, 12)


def test_the_highest_lines_are_kept():
    generator = random.Random(0)
    for _ in range(200):
        lines = [Line(generator.randrange(99), generator.randrange(9)) for _ in range(12)]
        kept = highest(lines)
        assert set(kept) <= set(lines)
        assert len(kept) <= len({line.each for line in lines})
        for images in range(1, 120):
            expected = max(line.at(images) for line in lines)
            assert max(line.at(images) for line in kept) == expected


def test_sizes_are_grouped_by_elements():
    assert grouped([5, 7, 5]) == ((5, 2), (7, 1))
    assert sizes(grouped([5, 7, 5])) == [5, 5, 7]
