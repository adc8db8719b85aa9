"""A small run's setting, and steps of it; libraries that may not be there."""

import pytest

from fd_large.runtime.hooks import Setting, Update


@pytest.fixture
def make_setting(tmp_path):
    def make(first=0, total=10, **more):
        values = {
            "folder": tmp_path,
            "facts": {"recipe": "made_up", "student": "swinv2_tiny", "teacher": None},
            "first_update": first,
            "total_updates": total,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "accumulation": 2,
            "world_size": 1,
            "log_every": 4,
            "metrics": {"held_out/loss": "held-out loss"},
        }
        return Setting(**values | more)

    return make


@pytest.fixture
def run_updates():
    """Runs hooks over steps first..last-1; update i has loss i / 100, plus `shift`."""

    def run(hooks, setting, last, *, total=None, shift=0.0, evaluate=(), end="done"):
        for hook in hooks:
            hook.on_start(setting)
        total = total or setting.total_updates
        for index in range(setting.first_update, last):
            for hook in hooks:
                hook.after_update(Update(index, total, 0, index / 100 + shift, 1.5, 1e-3))
            if index + 1 in evaluate:
                for hook in hooks:
                    hook.on_evaluation(index + 1, {"held_out_loss": index + 1.0 + shift})
        if end:
            for hook in hooks:
                hook.on_end(end)

    return run


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")
