"""A placed teacher: what the canary asks of it, its type, and the image embedding of a CLIP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_clip
import tiny_runs
import torch
from torch import nn

import fd_large
from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.cli.export import export
from fd_large.engine.find_model import find_model
from fd_large.engine.trained_model import TrainedModel
from fd_large.errors import ConfigError
from fd_large.recipes.run import ONLY
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.grids import TeacherOnShapes
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Summary, Teacher
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.teacher import PlacedTeacher, built_teacher
from fd_large.tasks.jobs import job_of
from fd_large.weights.resolve import Sources


class Net(nn.Module):
    width = 5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 5)
        self.tokens = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False]))


class Mapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.width = Net(), Net.width
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return type("Map", (), {"tokens": images.float().mean((2, 3))[:, None]})


@pytest.fixture
def teacher():
    return PlacedTeacher(Mapping(), None, None)


def test_the_hash_is_that_of_the_bits_held_here(teacher) -> None:
    first = teacher.shard_hash()
    assert first.startswith("1/1 ")
    assert teacher.shard_hash() == first == PlacedTeacher(Mapping(), None, None).shard_hash()
    for tensor, other in [
        (teacher.module.net.linear.weight.data[1, 2:], 0.125),
        (teacher.module.net.tokens.data[-1:], 0.125),
        (teacher.module.net.scale.view(1), 0.0),
        (teacher.module.net.index[3:], 0),
        (teacher.module.net.mask[:1], False),
    ]:
        before = tensor.clone()
        tensor.fill_(other)
        assert teacher.shard_hash() != first
        tensor.copy_(before)
        assert teacher.shard_hash() == first


def test_the_fixed_images_are_noise_and_always_the_same(teacher) -> None:
    state = torch.random.get_rng_state()
    maps = [teacher.map_of_fixed_images(size) for size in (30, 30)]
    first, second = teacher.module.seen
    assert first.shape == (2, 3, 30, 30)
    assert first.dtype == torch.uint8
    assert (first == second).all()
    assert (first[0] != first[1]).any()
    assert len(first.unique()) == 256
    assert torch.equal(*maps)
    assert not maps[0].requires_grad
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("dtype", "student_type", "held"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_its_type_and_that_random_weights_are_said(dtype, student_type, held, caplog):
    run = tiny_runs.tiny_run()
    entry = replace(run.taught_by[ONLY], dtype=dtype, teacher_image_size=0)
    teacher = built_teacher(
        "",
        entry,
        TeacherOnShapes("", entry, run.student, image_size=32).make,
        Sources(),
        student_type=student_type,
        seed=1,
        node_size=1,
        persistence_threshold=0,
    )
    assert {str(p.dtype) for p in teacher.module.parameters()} == {f"torch.{held}"}
    assert "teacher: RANDOM weights (--teacher.source random)" in caplog.text


IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


def settled(source: str, **fields):
    """A run whose teacher clip is a folder's CLIP, and whose student is of the same kind."""
    run = tiny_runs.tiny_run()
    clip = NamedTeacher(
        source=source,
        targets=("map", "summary"),
        summary=Summary(layer="embedding", loss="cosine", normaliser="none"),
    )
    run = replace(
        run,
        student=Student(model="clip_vit_base_patch16", architecture=tiny_runs.VIT),
        teacher=Teacher(),
        objective=Objective(),
        teachers={"clip": replace(clip, **fields)},
    )
    return DistillationJob(run).settle(Sources())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, tiny_clip.transformers_clip(folder)


def test_the_target_is_the_embedding_and_a_student_that_has_learnt_it_classifies(clip, tmp_path):
    folder, theirs = clip
    run = settled(str(folder))
    assert run.teachers["clip"].summary.width == 12
    job = DistillationJob(run)
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    task = job.make_task().eval()
    summary = task.targets[1]
    with torch.no_grad():
        prepared = task.prepare(IMAGES, None, None)
        statistics = job.placed["clip"].module.statistics
        expected = theirs.get_image_features(normalise(IMAGES, statistics)).pooler_output
        (_, learnt) = references(task, **prepared)
        assert torch.allclose(learnt[:, 0], expected, atol=1e-5)

        # The teacher's own weights in the student and in its head: CLIP itself.
        net, _ = find_model(str(folder), job_of).build()
        task.student.load_state_dict(net.state_dict())
        summary.head.weight.copy_(theirs.visual_projection.weight)
        summary.head.bias.zero_()
    tiny_runs.store_task(tmp_path / "run", run, task)
    model = fd_large.load_student(tmp_path / "run")
    names = ["cat", "dog", "red house"]
    with torch.no_grad():
        found = model.zero_shot(IMAGES, names, text=folder, prompts=["a photo of a {}"])
        end = len(tiny_clip.WORDS) + 1
        number = {word: place + 1 for place, word in enumerate(tiny_clip.WORDS)}
        prompts = [["a", "photo", "of", "a", *name.split()] for name in names]
        ids = [[*(number[word] for word in prompt), end] for prompt in prompts]
        ids = torch.tensor([[*row, *[0] * (8 - len(row))] for row in ids])
        said = theirs(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            pixel_values=normalise(IMAGES, IMAGENET),
        )
    assert torch.allclose(found, said.logits_per_image.softmax(1), atol=1e-5)
    assert found.std(1).min() > 1e-3, "the classes differ"
    export(str(tmp_path / "run"), str(tmp_path / "exported"), "fd", "5GB")
    exported = fd_large.load_student(tmp_path / "exported")
    with torch.no_grad():
        again = exported.zero_shot(IMAGES, names, text=folder, prompts=["a photo of a {}"])
    assert torch.allclose(again, found, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "words"),
    [({}, "summaries of none"), ({"dino_summary": nn.Identity()}, "summaries of 'dino'")],
)
def test_zero_shot_says_what_the_student_has_not_learnt(heads, words):
    model = TrainedModel(
        nn.Identity(), IMAGENET, image_size=32, source="runs/a", heads=lambda: heads
    )
    with pytest.raises(ConfigError, match=words) as caught:
        model.zero_shot(IMAGES, ["cat"], text="open_clip:ViT-B-16/openai")
    said = str(caught.value)
    assert "--teachers.clip.summary.layer embedding" in said
    assert "clip_summary" not in said
    assert "teacher='dino'" not in said, "its class token is no image embedding"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer": "before_norm"}, "an embedding follows the final norm"),
        ({"source": "random", "model": "clip_vit_base_patch16"}, "no projection .* got random"),
    ],
)
def test_what_has_no_embedding(clip, fields, words):
    with pytest.raises(ConfigError, match=words):
        settled(**{"source": str(clip[0]), **fields})
