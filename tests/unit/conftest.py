"""A small run's setting, and steps of it; tiny models on disk; libraries that may not be there."""

import gc
import zlib

import pytest
import torch

from fd_large.runtime.hooks import Setting, Update


@pytest.fixture(autouse=True, scope="module")
def _collections_pass_by_what_stays():
    """Full collections, of which engines make many, pass by what is imported by now."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Triton complains of what is left when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _numbers_of_its_own(request):
    """What a test draws depends on no test before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


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

    def run(hooks, setting, last, *, shift=0.0, evaluate=(), end="done"):
        for hook in hooks:
            hook.on_start(setting)
        for index in range(setting.first_update, last):
            for hook in hooks:
                hook.after_update(Update(index, 0, index / 100 + shift, 1.5, 1e-3))
            if index + 1 in evaluate:
                for hook in hooks:
                    hook.on_evaluation(index + 1, {"held_out_loss": index + 1.0 + shift})
        if end:
            for hook in hooks:
                hook.on_end(end)

    return run


@pytest.fixture
def card():
    """A GPU that is not here; the test runs what a rank on it would run."""
    from fake_cuda import fake_cuda

    with fake_cuda() as card:
        yield card


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def vit_weights(tmp_path):
    """The folder of a ViT with CLS in this project's format."""
    import tiny_runs  # Not for all tests: it imports DeepSpeed.

    return tiny_runs.vit_file(tmp_path)


@pytest.fixture
def distillation(tmp_path):
    """A run's folder, its recipe with a random teacher, and the task whose averages it stores."""
    import tiny_runs

    folder, run = tmp_path / "runs" / "tiny", tiny_runs.tiny_run()
    task, worse = tiny_runs.tiny_task(run), tiny_runs.tiny_task(run)
    for parameter in worse.parameters():
        parameter.data += 1
    ema = {name: p.detach() for name, p in task.named_parameters()}
    tiny_runs.store_task(folder, run, worse, ema=ema)
    return folder, run, task
