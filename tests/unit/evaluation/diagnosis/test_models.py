"""The words of the command line become the models that they name, with their losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
from labelled_folder import labelled_folder
from loading import scattered
from stored_run import store_tensors
from torchvision.io import read_image

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP, normalise
from fd_large.data.centre_crops import central_view
from fd_large.engine.find_model import NamedModel
from fd_large.errors import ConfigError
from fd_large.evaluation.diagnosis.examine import blocks_of
from fd_large.evaluation.diagnosis.landscape import curve, random_direction
from fd_large.evaluation.diagnosis.models import DRIFT, LoadedModel, Loss
from fd_large.evaluation.diagnosis.models import load_model as load
from fd_large.evaluation.diagnosis.sample import Sample
from fd_large.recipes import registry
from fd_large.recipes.sections import Data, Student
from fd_large.recipes.stored import read_recipe
from fd_large.tasks.classification.job import FineTuningJob
from fd_large.tasks.classification.task import FineTuning
from fd_large.tasks.distillation.section import Teacher

IMAGES = torch.randint(
    0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


OBJECTIVE = "the run's own objective"


def load_model(source: str) -> LoadedModel:
    return load(source, Sample("builtin:photographs", 4))


def names(loaded: LoadedModel) -> list[str]:
    """What each loss measures first."""
    return [next(iter(loss.on(IMAGES, [0, 1, 2])())) for loss in loaded.losses]


def at_zero(loss: Loss) -> tuple[float, list[float]]:
    """The loss itself, and a landscape of two points: zero, and a step."""
    measure = loss.on(IMAGES, [0, 1, 2])
    with torch.no_grad():
        (own,) = measure().values()
    direction = random_direction(loss.module, 0)
    found = curve(loss.module, measure, direction, [0.0, 0.2], lambda: None)
    return own, [value for at in found for value in at.values()]


def test_a_run_is_its_student_under_its_own_objective(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(str(folder))
    assert (loaded.label, loaded.image_size) == ("tiny", 32)
    assert names(loaded) == [OBJECTIVE, DRIFT]
    assert (loaded.statistics, loaded.positions) == (IMAGENET, "relative")
    assert not loaded.is_supervised
    # The average of the weights, not the last ones.
    for name, parameter in loaded.losses[0].module.named_parameters():
        assert torch.equal(parameter, task.get_parameter(name))
    with torch.no_grad():
        expected = task(**task.prepare(IMAGES, None, None))[0].item()
    own, (zero, away) = at_zero(loaded.losses[0])
    assert own == expected
    assert zero == expected
    assert away != expected
    assert at_zero(loaded.losses[1])[1][0] == 0
    # Another run's teacher may give other maps: its objective is comparable with none.
    again = load_model(str(folder / "checkpoints" / "step_00000003"))
    objectives, drifts = ({m.losses[n].comparable for m in (loaded, again)} for n in (0, 1))
    assert (len(objectives), len(drifts)) == (2, 1)


def test_the_student_alone_has_no_loss_of_its_run(distillation) -> None:
    folder, _, _ = distillation
    alone = load_model(f"{folder}#student")
    assert names(alone) == [DRIFT]
    assert alone.left_out == ""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in folders of two classes, to learn from and to test on."""
    return labelled_folder(tmp_path_factory.mktemp("labelled"), train=6, val=6, side=40)


@pytest.fixture
def fine_tuned(labelled: Path, tmp_path: Path) -> tuple[Path, FineTuning]:
    run = replace(
        registry.get("finetune_clip_vit_base"),
        student=Student(model="vit_base_patch16", architecture=tiny_runs.VIT),
        data=Data(root=str(labelled), image_size=32, workers=0),
    )
    task = scattered(FineTuningJob(run).make_task(), seed=3).eval()
    tiny_runs.store_task(tmp_path / "fine", run, task)
    return tmp_path / "fine", task


def test_a_run_that_learnt_labels_has_its_cross_entropy_and_accuracy(
    fine_tuned, labelled: Path
) -> None:
    folder, task = fine_tuned
    sample = Sample(str(labelled), 6)
    assert sample.root == str(labelled / "val")
    loaded = load(str(folder), sample)
    assert (loaded.is_supervised, loaded.left_out) == (True, "")
    (batch,) = sample.batches(1, [32])
    with torch.no_grad():
        found = loaded.losses[0].on(batch.of_size[32], batch.numbers)()
    # All test images of a plain data loader.
    images = [read_image(str(path)) for path in sorted((labelled / "val").rglob("*.png"))]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    pixels = normalise(torch.stack([central_view(image, 32) for image in images]), IMAGENET)
    with torch.no_grad():
        logits = task.logits(pixels, None)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    accuracy = 100 * (logits.argmax(-1) == labels).float().mean().item()
    assert found == pytest.approx({"cross-entropy": loss, "accuracy (%)": accuracy}, rel=1e-5)
    # The classifier's weights move, too.
    assert "head.weight" in random_direction(loaded.losses[0].module, 0)
    assert loaded.losses[1].comparable == DRIFT
    # What it began from taught it before.
    run = read_recipe(folder, where="test")
    run = replace(run, student=replace(run.student, init="teacher.pth"))
    tiny_runs.store_task(folder.parent / "tuned", run, task)
    assert not load(str(folder.parent / "tuned"), sample).is_supervised


def test_a_cross_entropy_needs_images_of_the_classes(fine_tuned, labelled: Path, caplog) -> None:
    folder, _ = fine_tuned
    loaded = load(str(folder), Sample("builtin:photographs", 2))
    assert names(loaded) == [DRIFT]
    assert loaded.left_out.startswith("cross-entropy is left out: data.root: images without labels")
    assert loaded.left_out in caplog.text


def test_a_checkpoint_is_named_by_its_own_path(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(str(folder / "checkpoints" / "step_00000003"))
    assert torch.equal(loaded.losses[0].module.projection.weight, task.projection.weight)


def test_a_student_from_scratch(distillation) -> None:
    folder, _, task = distillation
    loaded = load_model(f"{folder}#scratch")
    assert (loaded.label, names(loaded)) == ("tiny: from scratch", [DRIFT])
    assert not torch.equal(loaded.backbone.norm.weight, task.student.norm.weight)
    assert at_zero(loaded.losses[0])[0] == 0
    assert loaded.scratch is None
    # The twin of the run is the same model.
    twin, _ = load_model(str(folder)).scratch.build()
    for one, other in zip(twin.parameters(), loaded.backbone.parameters(), strict=True):
        assert torch.equal(one, other)


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
    measure = load_model("vit_base_patch16=random").losses[0].on(IMAGES, [0, 1, 2])
    assert measure() == {DRIFT: 0}
    net.tokens = moved
    # The mean of d^2 / 4 where |d| < 2, of normal d with deviation 0.5.
    assert measure()[DRIFT] == pytest.approx(0.0625, rel=0.05)


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
    left = {"norm.weight", "norm.bias", "cls_token"}
    net = build("vit_base_patch16", shape, seed=1)
    tensors = {f"student.{n}": p.detach() for n, p in net.named_parameters() if n not in left}
    store_tensors(tmp_path / "detector", tensors, recipe=run.to_dict())
    loaded = load_model(str(tmp_path / "detector"))
    assert loaded.image_size == 32
    assert loaded.backbone(torch.zeros(1, 3, 32, 32)).grid == (4, 4)


def test_a_run_whose_teacher_is_gone(distillation, tmp_path: Path) -> None:
    folder, run, task = distillation
    run = replace(run, teacher=replace(run.teacher, source=str(tmp_path / "gone.pth")))
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    loaded = load_model(str(folder))
    assert names(loaded) == [DRIFT]
    assert "gone.pth" in loaded.left_out
    assert "--teacher" not in loaded.left_out  # The user named the run alone.


def test_a_run_of_another_task_is_its_student(distillation) -> None:
    folder, run, task = distillation
    run = replace(run, task=replace(run.task, name="finetune"), teacher=Teacher())
    tensors = {name: p.detach() for name, p in task.named_parameters() if "student" in name}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    loaded = load_model(str(folder))
    assert (loaded.label, names(loaded)) == ("tiny", [DRIFT])
    for name, parameter in loaded.backbone.named_parameters():
        assert torch.equal(parameter, task.student.get_parameter(name))
    with pytest.raises(ConfigError, match="got 'teacher'"):
        load_model(f"{folder}#teacher")


def test_weights_alone_lose_by_moving(vit_weights: Path) -> None:
    loaded = load_model(str(vit_weights))
    assert (loaded.label, loaded.image_size, names(loaded)) == ("vit", 32, [DRIFT])
    assert (loaded.statistics, loaded.positions) == (OPENAI_CLIP, "absolute")
    own, (zero, away) = at_zero(loaded.losses[0])
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
    found = list(blocks_of(load_model(name).backbone))
    assert found[0] == first
    assert len(found) == count


def test_blocks_of_our_nets(distillation, vit_weights: Path) -> None:
    assert list(blocks_of(load_model(str(vit_weights)).backbone)) == ["blocks.0", "blocks.1"]
    assert list(blocks_of(load_model(str(distillation[0])).backbone)) == [
        f"layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)
    ]
