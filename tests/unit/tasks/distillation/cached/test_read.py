"""Learning from stored maps: bit by bit what the teacher gives, and refused where it is not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cached_runs import IMAGES, VIEWS, Killed, built, cached, prepared, run_of, write, write_images
from PIL import Image

from fd_large.data.sampler import Portion
from fd_large.errors import CacheError, CheckpointError, ConfigError, DataError, FDError
from fd_large.recipes.run import ONLY


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def live(root):
    return built(run_of(root))


@pytest.fixture(scope="module")
def cache(live, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    assert write(live, folder) == IMAGES * VIEWS
    assert write(live, folder) == 0
    return folder


def test_every_bit_is_that_of_the_live_teacher(root, live, cache):
    job = cached(root, cache, **{"teacher.model": "auto", "teacher.architecture": {}})
    assert job.run.teacher.model == live.run.teacher.model
    assert job.teachers[ONLY].fingerprint == live.teachers[ONLY].fingerprint
    assert not job.learns_from_images_alone
    for epoch in (0, 1, 4):
        pairs = list(zip(prepared(job, epoch), prepared(live, epoch), strict=True))
        assert len(pairs) == IMAGES // 2
        for (own, stored), (theirs, given) in pairs:
            assert torch.equal(own.images, theirs.images)
            assert torch.equal(stored["maps"][ONLY].tokens, given["maps"][ONLY].tokens)
            assert stored["maps"][ONLY][1:] == given["maps"][ONLY][1:]


def test_a_run_without_said_views_takes_the_caches(root, cache):
    fields = {f"task.distillation.{name}": 0 for name in ("views", "view_seed")}
    settled = cached(root, cache, **fields).run.task.distillation
    assert (settled.views, settled.view_seed) == (VIEWS, 5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data.image_size": 40}, r"data\.image_size 32 in the cache but 40 here"),
        ({"data.min_crop_scale": 0.5}, r"data\.min_crop_scale"),
        ({"task.distillation.views": 3}, r"task\.distillation\.views 2 in the cache but 3 here"),
        ({"task.distillation.view_seed": 6}, r"task\.distillation\.view_seed"),
        ({"teacher.model": "swinv2_tiny", "teacher.architecture": {}}, "model"),
        ({"objective.layer": "before_norm"}, "layer"),
        ({"objective.teacher_image_size": 64}, "teacher_image_size"),
        ({"data.image_mixup": True}, r"data\.image_mixup"),
        ({"eval.root": "builtin:photographs-held-out"}, r"eval\.root: .* no maps of held-out"),
    ],
)
def test_what_differs_is_named(root, cache, fields, named):
    with pytest.raises(FDError, match=named):
        cached(root, cache, **fields)


def test_other_images_are_refused(cache, tmp_path):
    write_images(tmp_path)
    (tmp_path / "11.png").unlink()
    with pytest.raises(CacheError, match=r"images 12 .* 11 .*hash"):
        cached(tmp_path, cache)


def test_an_image_that_changed_is_found(cache, tmp_path):
    write_images(tmp_path)
    Image.open(tmp_path / "03.png").transpose(Image.FLIP_TOP_BOTTOM).save(tmp_path / "03.png")
    job = cached(tmp_path, cache)
    with pytest.raises(CacheError, match=r"03\.png"):
        list(job.batches(job.samples, Portion(0, 0, 2, 0, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_the_run_by_name(root, cache, tmp_path, workers):
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    shard = copied / "view_1-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    for place in range(len(damaged) // 2, len(damaged), 100):
        damaged[place] ^= 1
    shard.write_bytes(damaged)
    job = cached(root, copied, **{"data.workers": workers})
    assert len(list(job.batches(job.samples, Portion(0, 0, 2, 0, 1)))) == IMAGES // 2
    with pytest.raises(CacheError, match=rf"{shard.name}: record \d+: ") as caught:
        list(job.batches(job.samples, Portion(1, 0, 2, 0, 1)))
    assert caught.value.rank_local
    shard.write_bytes(damaged[:-1])
    with pytest.raises(CacheError, match=shard.name):
        cached(root, copied)


def test_a_killed_cache_goes_on(live, cache, tmp_path):
    with pytest.raises(Killed):
        write(live, tmp_path, most=IMAGES + 3)
    with pytest.raises(CacheError, match=r"2 of 4 shards"):
        cached(live.run.data.root, tmp_path)
    assert write(live, tmp_path) == IMAGES - 3
    for path in cache.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_cache_that_is_left_between_batches_goes_on(live, cache, tmp_path):
    batches = iter(range(4))
    with pytest.raises(StopIteration):
        write(live, tmp_path, between=lambda: next(batches))
    assert write(live, tmp_path) == IMAGES * VIEWS - 4 * 2
    for path in cache.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_an_image_that_cannot_be_used_has_a_stand_in(tmp_path):
    root, cache = tmp_path / "images", tmp_path / "cache"
    write_images(root)
    good = (root / "03.png").read_bytes()
    (root / "03.png").write_bytes(b"no image")
    live = built(run_of(root))
    write(live, cache)
    job = cached(root, cache)
    for (own, stored), (theirs, given) in zip(prepared(job, 1), prepared(live, 1), strict=True):
        assert torch.equal(own.indices, theirs.indices)
        assert torch.equal(stored["maps"][ONLY].tokens, given["maps"][ONLY].tokens)
    (root / "03.png").write_bytes(good)
    (bad,) = [bad for batch, _ in prepared(job, 1) for bad in batch.bad]
    assert "03.png: no map" in bad
    (root / "03.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"03\.png"):
        write(live, tmp_path / "other", max_bad_fraction=0.0)


def test_a_checkpoint_of_other_targets_is_refused(root, live, cache, tmp_path):
    write(live, tmp_path, precision="int8")
    job = cached(root, cache)
    job.check_stored(job.facts())
    assert job.facts()["teacher_source"] == "random"
    with pytest.raises(CheckpointError, match=r"int8.*fp32"):
        cached(root, tmp_path).check_stored(job.facts())


def test_no_other_images_are_shown_to_a_cache(root, cache):
    job = cached(root, cache)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"--teacher\.source"):
        job.make_task().prepare(images, None, None)
    # But a micro-batch can be tried, and a step counted.
    batch = job.probe_batch(3)
    job.make_task().shapes_only(batch).backward()
    assert job.tensor_sizes() == (tuple(p.numel() for p in job.make_task().parameters()), ())
    _, frozen = job.models_on_shapes()
    assert frozen == ()
    assert job.frozen_models()["teacher"].section.source == "random"


def test_too_small_a_disk_is_refused(live, tmp_path, monkeypatch):
    usage = shutil_usage(free=100)
    monkeypatch.setattr("fd_large.tasks.distillation.cached.write.shutil.disk_usage", usage)
    with pytest.raises(CacheError, match="little room"):
        write(live, tmp_path / "cache")


def shutil_usage(*, free):
    return lambda path: type("Usage", (), {"free": free})()


def test_the_header_says_what_is_stored(cache, live):
    content = json.loads((cache / "cache.json").read_text())
    assert content["facts"]["teacher_hash"] == live.teachers[ONLY].fingerprint
    assert content["facts"]["hash of the list of images"] == live.samples.fingerprint
    assert content["teacher"]["source"] == "random"


def test_some_of_several_teachers_are_cached(root, live, cache):
    entry = live.run.taught_by[ONLY]
    usual = run_of(root)
    alone = replace(usual, teacher=type(usual.teacher)(), objective=type(usual.objective)())
    several = {"stored": replace(entry, source=f"cached:{cache}"), "shown": entry}
    job = built(replace(alone, teachers=several))
    assert list(job.placed) == ["shown"]
    for _, found in prepared(job, 1):
        maps = found["maps"]
        assert torch.equal(maps["stored"].tokens, maps["shown"].tokens)
    assert job.facts()["teachers"]["stored"]["teacher_hash"] == job.placed["shown"].fingerprint
    several["stored"] = replace(several["stored"], layer="before_norm")
    with pytest.raises(CacheError, match=r"--teachers\.stored\.source.*layer"):
        built(replace(alone, teachers=several))
