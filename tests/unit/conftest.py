"""A small run's setting, and steps of it."""

from dataclasses import replace

import pytest

from fd_large.recipes import registry
from fd_large.recipes.sections import Batch, Runtime
from fd_large.runtime.hooks import Setting, Update


@pytest.fixture
def make_setting(tmp_path):
    def make(first=0, total=10, log_every=4):
        run = replace(
            registry.get("fd_swinv2_base"),
            batch=Batch(global_batch_size=8, micro_batch_size=4),
            runtime=Runtime(log_every=log_every),
        )
        return Setting(tmp_path, run, first, total, 4, 2, 1)

    return make


@pytest.fixture
def run_updates():
    """Runs hooks over steps first..last-1; update i has loss i / 100, plus `shift`."""

    def run(hooks, setting, last, *, total=None, shift=0.0, evaluate=(), end="done"):
        for hook in hooks:
            hook.on_start(setting)
        for index in range(setting.first_update, last):
            update = Update(
                index,
                total or setting.total_updates,
                0,
                index / 100 + shift,
                1.5,
                1e-3,
            )
            for hook in hooks:
                hook.after_update(update)
            if index + 1 in evaluate:
                for hook in hooks:
                    hook.on_evaluation(index + 1, {"held_out_loss": index + 1.0 + shift})
        if end:
            for hook in hooks:
                hook.on_end(end)

    return run
