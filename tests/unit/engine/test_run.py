"""What the engine puts around a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fd_large.engine.job import Job
from fd_large.engine.run import hooks_of
from fd_large.recipes import registry
from fd_large.runtime.hooks import Hook


class Watched(Job):
    def hooks(self):
        return [TaskHook()]


class TaskHook(Hook):
    pass


def names(run, profile=0, more=()):
    return [type(hook).__name__ for hook in hooks_of(Watched(run), profile, more)]


def test_the_meter_is_asked_first_and_the_watchdog_last():
    found = names(registry.get("fd_swinv2g"), more=[Hook()])
    assert found[0] == "Meter"
    assert found[-3:] == ["TaskHook", "Hook", "Watchdog"]
    assert {"Meter", "FeaturePanel", "Preemption", "Guard"} <= set(found)


@pytest.mark.parametrize(
    ("section", "field", "off", "hook"),
    [
        ("guard", "enabled", False, "Guard"),
        ("runtime", "preemption", False, "Preemption"),
        ("runtime", "watchdog_seconds", 0.0, "Watchdog"),
    ],
)
def test_each_can_be_turned_off(section, field, off, hook):
    run = registry.get("quickstart")
    changed = replace(getattr(run, section), **{field: off})
    assert hook in names(run)
    assert hook not in names(replace(run, **{section: changed}))


def test_a_trace_only_where_it_is_asked_for():
    run = registry.get("quickstart")
    assert "Profiler" not in names(run)
    assert "Profiler" in names(run, profile=3)
