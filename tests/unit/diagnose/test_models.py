"""The words of the command line become the models that they name, with their losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stored_run import store_tensors

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.diagnose.examine import blocks_of
from fd_large.diagnose.landscape import curve, random_direction
from fd_large.diagnose.models import DRIFT, OBJECTIVE, LoadedModel, load_model
from fd_large.engine.find_model import NamedModel
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.section import Teacher

IMAGES = torch.randint(
    0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def at_zero(loaded: LoadedModel) -> tuple[float, list[float]]:
    """The loss itself, and a landscape of two points: zero, and a step."""
    loss = loaded.loss_on(IMAGES)
    with torch.no_grad():
        own = loss().item()
    direction = random_direction(loaded.trained, 0)
    return own, curve(loaded.trained, loss, direction, [0.0, 0.2], lambda: None)


def test_a_run_is_its_student_under_its_own_objective(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(str(folder))
    assert (loaded.label, loaded.image_size, loaded.loss_name) == ("tiny", 32, OBJECTIVE)
    assert loaded.statistics == IMAGENET
    # The average of the weights, not the last ones.
    for name, parameter in loaded.trained.named_parameters():
        assert torch.equal(parameter, task.get_parameter(name))
    with torch.no_grad():
        expected = task(**task.prepare(IMAGES, None, None))[0].item()
    own, (zero, away) = at_zero(loaded)
    assert own == expected
    assert zero == expected
    assert away != expected


def test_a_checkpoint_is_named_by_its_own_path(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(str(folder / "checkpoints" / "step_00000003"))
    assert torch.equal(loaded.trained.projection.weight, task.projection.weight)


def test_a_student_from_scratch(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(f"{folder}#scratch")
    assert (loaded.label, loaded.loss_name) == ("tiny: from scratch", DRIFT)
    assert not torch.equal(loaded.backbone.norm.weight, task.student.norm.weight)
    assert at_zero(loaded)[0] == 0


@pytest.mark.parametrize("offset", [0.0, 10.0, 30.0])
def test_channels_that_are_large_and_hardly_vary_hide_no_change(offset, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(4, 49, 64, generator=generator)
    moved = still + 0.5 * torch.randn(still.shape, generator=generator)
    for tokens in (still, moved):
        tokens[..., :4] += offset

    class Net(torch.nn.Module):
        tokens = still

        def forward(self, pixels):
            return FeatureMap(self.tokens, (7, 7), 0)

    net = Net()
    monkeypatch.setattr(NamedModel, "build", lambda self: (net, IMAGENET))
    loss = load_model("vit_base_patch16=random").loss_on(IMAGES)
    assert loss() == 0
    net.tokens = moved
    # The mean of d^2 / 4 where |d| < 2, of normal d with deviation 0.5.
    assert loss().item() == pytest.approx(0.0625, rel=0.05)


def test_a_teacher_of_one_size_sees_that_size(distillation) -> None:
    folder, run, task = distillation
    run = replace(run, data=replace(run.data, image_size=64))
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    # Its positions are for 32 pixels: in training, too, it gets images of the student resized.
    loaded = load_model(f"{folder}#teacher")
    assert loaded.image_size == 32
    assert loaded.backbone.grid(32, 32) == (4, 4)


def test_a_detectors_student_sees_the_size_of_its_positions(distillation, tmp_path: Path) -> None:
    _, run, _ = distillation
    shape = run.teacher.architecture
    run = replace(
        run,
        task=replace(run.task, name="detection"),
        teacher=Teacher(),
        student=Student(model="vit_base_patch16", architecture=shape),
        data=replace(run.data, image_size=64),
    )
    names = {"norm.weight", "norm.bias", "cls_token"}
    net = build("vit_base_patch16", shape, seed=1)
    tensors = {f"student.{n}": p.detach() for n, p in net.named_parameters() if n not in names}
    store_tensors(tmp_path / "detector", tensors, recipe=run.to_dict())
    loaded = load_model(str(tmp_path / "detector"))
    assert loaded.image_size == 32
    assert loaded.backbone(torch.zeros(1, 3, 32, 32)).grid == (4, 4)


def test_a_run_whose_teacher_is_gone(distillation, tmp_path: Path) -> None:
    folder, run, task = distillation
    run = replace(run, teacher=replace(run.teacher, source=str(tmp_path / "gone.pth")))
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    with pytest.raises(WeightsError, match="tiny#student, whose landscape"):
        load_model(str(folder))
    assert load_model(f"{folder}#student").loss_name == DRIFT


def test_a_run_of_another_task_is_its_student(distillation) -> None:
    folder, run, task = distillation
    run = replace(run, task=replace(run.task, name="finetune"), teacher=Teacher())
    tensors = {name: p.detach() for name, p in task.named_parameters() if "student" in name}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    loaded = load_model(str(folder))
    assert (loaded.label, loaded.loss_name) == ("tiny", DRIFT)
    for name, parameter in loaded.backbone.named_parameters():
        assert torch.equal(parameter, task.student.get_parameter(name))
    with pytest.raises(ConfigError, match="has no teacher"):
        load_model(f"{folder}#teacher")


def test_weights_alone_lose_by_moving(vit_weights: Path) -> None:
    loaded = load_model(str(vit_weights))
    assert (loaded.label, loaded.image_size, loaded.loss_name) == ("vit", 32, DRIFT)
    assert loaded.statistics == OPENAI_CLIP
    own, (zero, away) = at_zero(loaded)
    assert own == zero == 0
    assert away > 0


def test_a_named_net_with_random_weights() -> None:
    first, again = (load_model("timm:test_vit=random") for _ in range(2))
    assert first.label == "test_vit, random"
    assert first.image_size == 160
    for a, b in zip(first.backbone.parameters(), again.backbone.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("timm:test_vit=random", "net.blocks.0", 6),
        ("timm:test_efficientnet=random", "net.blocks.0.0", 5),
        ("timm:test_resnet=random", "net.layer1.0", 4),
        ("timm:test_convnext=random", "net.stages.0.blocks.0", 9),
    ],
)
def test_blocks_of_nets_of_timm(name: str, first: str, count: int) -> None:
    names = list(blocks_of(load_model(name).backbone))
    assert names[0] == first
    assert len(names) == count


def test_blocks_of_our_nets(distillation, vit_weights: Path) -> None:
    assert list(blocks_of(load_model(str(vit_weights)).backbone)) == ["blocks.0", "blocks.1"]
    assert list(blocks_of(load_model(str(distillation[0])).backbone)) == [
        f"layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)
    ]
