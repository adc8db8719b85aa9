"""Fine-tuning as a Module: how it is counted, and that it learns as the official one."""

from __future__ import annotations

from dataclasses import replace

import official
import pytest
import torch
from engine_steps import forward_at
from tiny_timm import tiny
from torch.utils.flop_counter import FlopCounterMode

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.loader import Batch
from fd_large.engine.student import make_student, student_weights
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Optim
from fd_large.tasks.classification.mean_token import DISCARDED
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.finetuning import mixing
from fd_large.tasks.finetuning.task import FineTuning
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
        initial=student_weights(student, Sources(), image_size=32, without=DISCARDED),
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
