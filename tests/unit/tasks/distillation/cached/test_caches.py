"""The caches of a run: which it opens, and those of held-out views."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cached_runs import built, cached, run_of, write, write_images

from fd_large.data.views import ViewSettings
from fd_large.errors import CacheError, ConfigError
from fd_large.tasks.distillation.cached.caches import (
    RunCaches,
    held_out_views,
    held_out_writer,
)
from fd_large.tasks.distillation.cached.write import write_cache
from fd_large.tasks.distillation.section import NamedTeacher, Views


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A live job with an evaluation, and a cache of its training and held-out views."""
    root, cache = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("cache")
    write_images(root)
    job = built(run_of(root, **{"eval.root": str(root), "eval.views": 5}))
    write(job, cache)
    (teacher,), (entry,) = job.placed.values(), job.run.taught_by.values()
    crops, settings = job.held_out(job.samples), job.view_settings()
    writer = held_out_writer(cache, teacher, entry, crops, settings, precision="fp32")
    views = held_out_views(crops, settings, batch_size=2)
    options = {"workers": 0, "max_bad_fraction": 0.0, "where": "OUT"}
    assert write_cache(writer, teacher, views, **options) == 2 * 5
    return job, cache


def measured(job):
    torch.manual_seed(0)
    task = job.make_task()
    engine = SimpleNamespace(task=task, deepspeed=task)
    (evaluation,) = job.evaluations(engine, job.samples, 2)
    return evaluation.measure(0, True, lambda: None)


def test_figures_and_panel_are_those_of_the_live_teacher(stored):
    live, cache = stored
    fields = {"eval.root": live.run.eval.root, "eval.views": 5}
    job = cached(live.run.data.root, cache, **fields)
    assert not job.placed
    (found, panel), (expected, shown) = measured(job), measured(live)
    assert found == expected
    assert {"held_out_loss", "unseen_crops_best_constant"} <= found.keys()
    assert panel.keys() == shown.keys()
    assert all(np.array_equal(panel[name], shown[name]) for name in shown)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"eval.views": 6}, r"eval\.root: .*eval\.views 5 in the cache but 6 here"),
        ({"eval.root": "builtin:photographs-held-out"}, r"eval\.root: .*hash .* of held_out"),
    ],
)
def test_other_held_out_views_are_refused(stored, fields, named):
    live, cache = stored
    root = live.run.data.root
    with pytest.raises(CacheError, match=named):
        cached(root, cache, **{"eval.root": root, "eval.views": 5, **fields})


def test_a_cache_is_opened_when_it_is_asked_for_and_not_stored_again(tmp_path):
    models = {"shown": NamedTeacher(model="dino_vit_base_patch16", source="random")}

    def caches_of(entries, **section):
        return RunCaches(entries, Views(**section), ViewSettings(32, 0.5), "auto")

    assert not caches_of(models)
    assert caches_of(models).blank_maps(3) is None
    both = {**models, "stored": NamedTeacher(source=f"cached:{tmp_path}")}
    caches = caches_of(both)
    assert caches
    assert "shown" not in caches
    assert caches.folders == {"stored": tmp_path}
    with pytest.raises(ConfigError, match=r"maps .*--teachers\.stored"):
        caches_of(both, cache="elsewhere", views=1).check("stored")
    with pytest.raises(CacheError, match=r"--teachers\.stored\.source"):
        caches.check("stored")
