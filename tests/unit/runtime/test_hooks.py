"""Several hooks at once: what the loop does with what each of them says."""

import pytest

from fd_large.runtime.hooks import NOTHING, Hook, Verdict


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], Verdict()),
        ([None, None], Verdict()),
        ([Verdict(), Verdict(skip=True), None], Verdict(skip=True)),
        # The earliest state, also the state before the first step.
        ([Verdict(roll_back=5), Verdict(roll_back=3), Verdict()], Verdict(roll_back=3)),
        ([Verdict(roll_back=5), Verdict(roll_back=0)], Verdict(roll_back=0)),
        # The first reason to end.
        ([Verdict(), Verdict(stop="guard"), Verdict(stop="other")], Verdict(stop="guard")),
    ],
)
def test_verdicts_together(verdicts, expected):
    assert Verdict.all_of(verdicts) == expected
    assert Verdict.all_of(iter(verdicts)) == expected


def test_a_hook_that_says_nothing_changes_nothing():
    hook = Hook()
    assert hook.wish() == NOTHING
    assert (NOTHING.stop, NOTHING.save) == (False, False)
    said = [hook.judge(None), hook.after_update(None), hook.on_save(3)]
    assert Verdict.all_of(said) == Verdict()
