"""Layouts: every element is held by one rank, and found again."""

import json

from hypothesis import given
from hypothesis import strategies as st

from fd_large.checkpoint import layout
from fd_large.checkpoint.layout import EachTensor, FlatGroups, Span

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def _flat(groups, ranks):
    named, number = [], 0
    for sizes in groups:
        named.append(tuple((f"t{number + i}", size) for i, size in enumerate(sizes)))
        number += len(sizes)
    shares = tuple(-(-sum(sizes) // ranks) for sizes in groups)
    return FlatGroups(tuple(named), shares, ranks)


def _covers(cut):
    for name, size in cut.sizes.items():
        held = [cut.span(rank, name) for rank in range(cut.ranks)]
        elements = [e for span in held for e in range(*span)]
        assert elements == list(range(size)), "each element once, in rank order"
        for start in range(0, size, 7):
            wanted = Span(start, min(size, start + 11))
            by_search = [
                rank
                for rank, span in enumerate(held)
                if max(span.start, wanted.start) < min(span.stop, wanted.stop)
            ]
            found = list(cut.holders(name, wanted))
            assert set(by_search) <= set(found)
            assert len(found) <= len(by_search) + 1
    assert layout.from_dict(json.loads(json.dumps(cut.to_dict()))) == cut


@given(SIZES, st.integers(1, 9))
def test_each_tensor_is_cut_without_gap_or_overlap(sizes, ranks):
    _covers(EachTensor({f"t{i}": size for i, size in enumerate(sizes)}, ranks))


@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(1, 9))
def test_flat_groups_are_cut_without_gap_or_overlap(groups, ranks):
    _covers(_flat(groups, ranks))


def test_nothing_wanted_needs_nobody():
    assert list(EachTensor({"t": 5}, 2).holders("t", Span(5, 5))) == []
    assert list(_flat([[5]], 2).holders("t0", Span(0, 0))) == []
