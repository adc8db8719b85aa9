"""A checkpoint by the clock: rank 0's, since the last one."""

from fd_large.ranks import distributed
from fd_large.runtime import save_interval
from fd_large.runtime.hooks import Wish
from fd_large.runtime.save_interval import SaveInterval


def test_so_many_minutes_after_the_last_one_and_on_rank_0_alone(make_setting, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(save_interval.time, "monotonic", lambda: now[0])
    hook = SaveInterval(0.5)
    hook.on_start(make_setting())
    wishes = []
    for seconds in (29, 1, 1):
        now[0] += seconds
        wishes.append(hook.wish().save)
    assert wishes == [False, True, True]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert hook.wish() == Wish()
    monkeypatch.undo()
    monkeypatch.setattr(save_interval.time, "monotonic", lambda: now[0])
    hook.on_save(3)
    now[0] += 29
    assert hook.wish() == Wish()
