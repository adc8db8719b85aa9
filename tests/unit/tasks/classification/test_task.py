"""Both heads as Modules: how they are counted, and that they learn as the official ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import official
import pytest
import torch
from engine_steps import forward_at
from tiny_timm import tiny
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.data.loader import Batch
from fd_large.engine.student import FINAL_NORM, make_student, student_weights
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.partition import load_weights
from fd_large.engine.zero.trust_ratio import scale_by_norms
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Optim
from fd_large.tasks.classification import mixing
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.classification.task import (
    FineTuning,
    Frozen,
    FrozenFeature,
    LinearProbing,
    mean_token,
    norm_of_mean,
    probe_batch,
)
from fd_large.weights.resolve import Sources

TINY = Architecture(embed_dim=16, depths=(2,), num_heads=(2,), patch_size=8, image_size=16)


MODELS = {
    "vit_base_patch16": TINY,
    # Its map is not normalised: the classifier normalises the mean.
    f"timm:{tiny('convnextv2_atto')}": Architecture(image_size=32),
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_only_on_the_meta_device_costs_what_a_step_costs(name):
    side = MODELS[name].image_size
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    batch = Batch(images, 0, torch.arange(2), torch.arange(2), targets=torch.full((2, 4), 0.25))
    counted = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            student = build(name, MODELS[name], drop_path_rate=0.1, is_trained=True)
            task = FineTuning(student, 4, statistics=IMAGENET)
        assert task.fc_norm is not None
        assert task.keep_all(images).shape == (len(student.drop_path_rates), 2)
        with FlopCounterMode(display=False) as flops:
            task.shapes_only(batch.to(device)).backward()
        counted.append(flops.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_a_classifier_of_the_users_own_is_trained_in_any_type(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from torch import nn\n"
        "def two(width, classes):\n"
        "    return nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, classes))\n"
    )
    doors.allow(path)
    for dtype in (torch.float32, torch.bfloat16):
        student = build("vit_base_patch16", TINY)
        task = FineTuning(student, 4, statistics=IMAGENET, head=f"module:{path}:two").to(dtype)
        images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        loss, _ = task(**task.prepare(images, torch.full((2, 4), 0.25), None))
        assert loss.dtype == torch.float32
        loss.backward()
        assert task.head[0].weight.grad is not None


def test_a_classifier_that_draws_is_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from torch import nn\ndef drops(width, classes):\n    return nn.Dropout(0.1)\n"
    )
    doors.allow(path)
    with pytest.raises(ConfigError, match=r"task\.finetune\.head.*Dropout"):
        FineTuning(
            build("vit_base_patch16", TINY), 4, statistics=IMAGENET, head=f"module:{path}:drops"
        )


def test_it_learns_as_in_the_official_code(make_engine, tmp_path):
    """main_finetune.py, without mixing and drop path; its numbers are float64."""
    settings, student = official.FINETUNING, official.student(tmp_path)
    decay = settings["layer_decay"]

    def make():
        task = FineTuning(
            make_student(student, image_size=32), official.CLASSES, statistics=IMAGENET
        )
        for name, parameter in task.head.named_parameters():
            parameter.data = official.weight(f"head.{name}", tuple(parameter.shape))
        return task

    engine = make_engine(
        make_task=make,
        optim=Optim(weight_decay=settings["weight_decay"], layer_decay=decay),
        initial={"student": student_weights(student, Sources(), image_size=32, without=FINAL_NORM)},
    )
    schedule, rates = official.schedule(settings), by_layer(engine, decay)
    losses = []
    for number in range(official.STEPS):
        batch = official.batch(number)
        targets = mixing.mix_labels(
            batch.targets,
            batch.targets,
            mixing.UNMIXED,
            num_classes=official.CLASSES,
            smoothing=settings["smoothing"],
        )
        batch = replace(batch, targets=targets)
        losses.append(float(forward_at(engine, schedule, number, batch, rates)))
        engine.deepspeed.step()
    expected = official.numbers()["finetuning"]
    assert losses == pytest.approx(expected["losses"], abs=1e-5)

    engine.task.eval()
    images, labels = (of("test", official.NUM_TEST) for of in (official.images, official.labels))
    with torch.no_grad():
        prepared = engine.task.prepare(images, labels, None)
        _, sums = engine.deepspeed(**prepared)
        logits = engine.task.logits(prepared["pixels"], None)
    sums.pop("predicted")
    found = averaged(sums)
    assert logits.flatten().tolist() == pytest.approx(expected["logits"], abs=1e-5)
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])
    assert found["loss"] == pytest.approx(expected["test_loss"], abs=1e-5)


SHALLOW = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=16)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    student = official.student(tmp_path_factory.mktemp("official"))
    feature = FrozenFeature(make_student(student, image_size=32), IMAGENET)
    weights = student_weights(student, Sources(), image_size=32, without=FINAL_NORM)
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
def test_a_probe_learns_as_in_the_official_code(make_engine, frozen, config):
    """main_linear.py; its numbers are float64."""
    settings, expected = official.LINEAR, official.numbers()["linear"]

    def make():
        return LinearProbing(frozen, official.CLASSES, norm_batch=official.BATCH)

    weights = make().state_dict()
    for name in ("head.weight", "head.bias"):
        weights[name] = official.weight(name, tuple(weights[name].shape))
    optim = Optim(name="lars", weight_decay=settings["weight_decay"], clip_norm=0.0)
    engine = make_engine(
        config, make_task=make, optim=optim, clip_norm=0.0, initial={"": weights.items()}
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


def test_a_probe_of_the_class_token_and_of_both():
    model = build("vit_base_patch16", SHALLOW)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = {}
    for pool, width in (("mean", 1), ("cls", 1), ("both", 2)):
        torch.manual_seed(0)
        feature = FrozenFeature(copy.deepcopy(model), IMAGENET, pool=pool)
        found[pool] = feature(images)
        assert found[pool].shape == (2, width * model.width)
        assert LinearProbing(Frozen(feature, feature), 3, norm_batch=2).head.weight.shape == (
            3,
            width * model.width,
        )
    assert torch.equal(found["both"], torch.cat([found["mean"], found["cls"]], 1))
    # The class token before the final norm, normalised without its factors.
    before = copy.deepcopy(model)
    before.norm = torch.nn.Identity()
    with torch.no_grad():
        token = before(normalise(images, IMAGENET)).tokens[:, 0]
    expected = layer_norm(token, (model.width,), eps=model.norm.eps)
    torch.testing.assert_close(found["cls"], expected)
    with pytest.raises(ConfigError, match=r"task\.linear\.pool: .*got cls"):
        FrozenFeature(build("swinv2_tiny", Architecture()), IMAGENET, pool="cls")


def test_only_the_layer_is_trained_and_any_number_of_images_probed(frozen):
    task = LinearProbing(frozen, 3, norm_batch=8)
    assert [name for name, _ in task.named_parameters()] == ["head.weight", "head.bias"]
    assert not task.train()._frozen[0].learning.training
    for size, loaded in ((1, 8), (9, 16)):
        batch = probe_batch(size, 32, norm_batch=8)
        assert (len(batch.images), len(batch.targets["places"])) == (loaded, size)
        task.shapes_only(batch).backward()
    with torch.device("meta"):
        feature = FrozenFeature(build("vit_base_patch16", SHALLOW), IMAGENET)
        counted = LinearProbing(Frozen(feature, feature), 3, norm_batch=8)
    counted.shapes_only(probe_batch(9, 16, norm_batch=8).to("meta")).backward()
    task.before_step(0)
    assert task.seen is None, "trials leave nothing behind"


def whole(parameter):
    held = getattr(parameter, "ds_tensor", parameter)
    return held.detach().flatten()[: getattr(parameter, "ds_numel", parameter.numel())].tolist()


VIT = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=32)
SWIN = Architecture(
    embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2, patch_size=4, image_size=32
)


@pytest.mark.parametrize(
    ("name", "shape", "norms_mean"),
    [
        # The official Swin takes the mean of what its final norm gives (forward_features).
        ("swinv2_tiny", SWIN, False),
        ("swin_base_esvit", SWIN, False),
        ("vit_base_patch16", VIT, True),
        (f"timm:{tiny('convnextv2_atto')}", Architecture(image_size=32), True),
    ],
)
def test_a_mean_that_is_normalised_where_the_map_is_not(name, shape, norms_mean):
    model = build(name, shape, seed=0).eval()
    raw: list[torch.Tensor] = []
    if name.startswith("vit"):
        model.norm.register_forward_hook(lambda norm, given, result: raw.append(given[0]))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model(pixels)
        # A ViT's mean is of what its final norm is given.
        tokens = raw[0] if raw else features.tokens
        expected = tokens[:, features.num_prefix_tokens :].mean(1)
        if norms_mean:
            expected = layer_norm(expected, expected.shape[-1:], eps=1e-6)
        norm = norm_of_mean(model)
        torch.testing.assert_close(mean_token(model(pixels), norm), expected)
