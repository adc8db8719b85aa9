"""The linear probe as a Module: the official feature, norm and LARS; groups of a batch."""

from __future__ import annotations

from itertools import pairwise

import official
import pytest
import torch
from engine_steps import forward_at

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.loader import Batch
from fd_large.engine.student import make_student, student_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.engine.zero.trust_ratio import scale_by_norms
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Optim
from fd_large.tasks.classification.mean_token import DISCARDED
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.linear.task import Frozen, FrozenFeature, LinearProbing, probe_batch
from fd_large.weights.resolve import Sources

TINY = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=16)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    student = official.student(tmp_path_factory.mktemp("official"))
    feature = FrozenFeature(make_student(student, image_size=32), IMAGENET)
    weights = student_weights(student, Sources(), image_size=32, without=DISCARDED)
    load_weights(feature.model, weights, where="student.init")
    return Frozen(feature, feature)


def grouped(batch: Batch) -> Batch:
    """As the loader gives it: labels, and which images they are of."""
    places = torch.arange(len(batch.images))
    return Batch(
        batch.images,
        0,
        batch.positions,
        batch.positions,
        targets={"labels": batch.targets, "places": places},
    )


@pytest.mark.parametrize("config", [(0, False), (1, False), (3, False)])
def test_it_learns_as_in_the_official_code(make_engine, frozen, config):
    """main_linear.py; its numbers are float64."""
    settings, expected = official.LINEAR, official.numbers()["linear"]

    def make():
        return LinearProbing(frozen, official.CLASSES, norm_batch=official.BATCH)

    weights = make().state_dict()
    for name in ("head.weight", "head.bias"):
        weights[name] = official.weight(name, tuple(weights[name].shape))
    optim = Optim(name="lars", weight_decay=settings["weight_decay"], clip_norm=0.0)
    engine = make_engine(
        config, make_task=make, optim=optim, clip_norm=0.0, weights=weights.items()
    )
    scale_by_norms(engine)
    losses, schedule = [], official.schedule(settings)
    for number in range(official.STEPS):
        batch = grouped(official.batch(number))
        losses.append(float(forward_at(engine, schedule, number, batch)))
        engine.deepspeed.step()
        engine.task.after_step()
        engine.task.before_step(0)
        if number == 0:
            after = whole(engine.task.head.weight)
            assert after == pytest.approx(expected["weight_after_one_step"], abs=1e-6)
    # They reach 36, where 1e-5 is three steps of float32.
    assert losses == pytest.approx(expected["losses"], rel=1e-6, abs=1e-5)
    for name in ("running_mean", "running_var"):
        found = getattr(engine.task, name)
        assert found.tolist() == pytest.approx(expected[name], abs=1e-5)

    engine.task.eval()
    images, labels = (of("test", official.NUM_TEST) for of in (official.images, official.labels))
    with torch.no_grad():
        prepared = engine.task.prepare(images, labels, None)
        _, sums = engine.deepspeed(**prepared)
    features = prepared["features"][: official.BATCH].flatten().tolist()
    assert features == pytest.approx(expected["features"], abs=1e-5)
    sums.pop("predicted")
    found = averaged(sums)
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert found["loss"] == pytest.approx(expected["test_loss"], rel=1e-6, abs=1e-5)


def test_statistics_depend_on_no_micro_batch(frozen):
    """A step of two groups of 8, at once and in micro batches that end inside them."""
    found = []
    images, labels = official.images("train", 16), official.labels("train", 16)
    for cuts in ((0, 16), (0, 4, 8, 12, 16)):
        task = LinearProbing(frozen, official.CLASSES, norm_batch=8)
        torch.nn.init.constant_(task.head.weight, 0.1)
        losses = []
        for start, stop in pairwise(cuts):
            first, end = start // 8 * 8, -(-stop // 8) * 8
            places = torch.arange(start - first, stop - first)
            targets = {"labels": labels[start:stop], "places": places}
            losses.append(task(**task.prepare(images[first:end], targets, None))[0])
        task.after_step()
        found.append([torch.stack(losses).mean(), task.running_mean, task.running_var])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice)
    _, mean, variance = found[0]
    groups = frozen.tested(images).view(2, 8, -1)
    torch.testing.assert_close(mean, 0.1 * groups.mean((0, 1)))
    torch.testing.assert_close(variance, 0.9 + 0.1 * groups.var(1).mean(0))


def test_only_the_layer_is_trained_and_any_number_of_images_probed(frozen):
    task = LinearProbing(frozen, 3, norm_batch=8)
    assert [name for name, _ in task.named_parameters()] == ["head.weight", "head.bias"]
    assert not task.train()._frozen[0].learning.training
    for size, loaded in ((1, 8), (9, 16)):
        batch = probe_batch(size, 32, norm_batch=8)
        assert (len(batch.images), len(batch.targets["places"])) == (loaded, size)
        task.shapes_only(batch).backward()
    with torch.device("meta"):
        feature = FrozenFeature(build("vit_base_patch16", TINY), IMAGENET)
        counted = LinearProbing(Frozen(feature, feature), 3, norm_batch=8)
    counted.shapes_only(probe_batch(9, 16, norm_batch=8).to("meta")).backward()
    task.before_step(0)
    assert task._seen is None, "trials leave nothing behind"


def whole(parameter):
    held = getattr(parameter, "ds_tensor", parameter)
    return held.detach().flatten()[: getattr(parameter, "ds_numel", parameter.numel())].tolist()
