"""Models of the user's own, as teachers and as students."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from loading import teacher_run
from plugins import install
from torch import nn

from fd_large import doors
from fd_large.backbones.custom.custom import check_map
from fd_large.backbones.registry import build, family_of, parameter_shapes
from fd_large.engine.frozen import frozen_weights
from fd_large.engine.student import group_norms, make_student
from fd_large.engine.task import Task
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.weights.resolve import Sources

OWN = """
import torch
from torch import nn
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics

class Patches(nn.Module):
    width, num_prefix_tokens = 12, 0
    statistics = Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 12, 8, stride=8)
        nn.init.constant_(self.cut.weight, 0.5)

    def grid(self, height, width):
        return height // 8, width // 8

    def forward(self, images, keep=None):
        x = self.cut(images)
        return FeatureMap(x.flatten(2).transpose(1, 2), tuple(x.shape[-2:]), 0)

def make():
    return Patches()

class Student(Patches):
    def __init__(self, drop_path_rate=0.0, image_size=16):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, (image_size // 8) ** 2, 12))
        self.drop_path_rates = (drop_path_rate,)

    def blocks(self):
        return [self.cut]

class Drops(Student):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

class Batches(Student):
    def __init__(self, **settings):
        super().__init__()
        self.norm = nn.BatchNorm1d(12, **settings)

    def forward(self, images, keep=None):
        found = super().forward(images)
        return found._replace(tokens=self.norm(found.tokens.flatten(0, 1)).view_as(found.tokens))

def whole_average():
    return Batches(momentum=None)

def untracked():
    return Batches(track_running_stats=False)

class OwnNorm(nn.BatchNorm1d):
    pass

class OwnBatches(Batches):
    def __init__(self):
        super().__init__()
        self.norm = OwnNorm(12)

class Bare(Student):
    def forward(self, images, keep=None):
        return super().forward(images, keep).tokens

class Wide(Student):
    width = 24

class Noisy(Student):
    def forward(self, images, keep=None):
        return super().forward(images + torch.rand_like(images), keep)

class Valued(Student):
    def forward(self, images, keep=None):
        return super().forward(images * float(images.max()), keep)

class Tall(Student):
    def grid(self, height, width):
        return 4, 1

class Prefixed(Student):
    num_prefix_tokens = 1

class Raises(Student):
    def forward(self, images, keep=None):
        return super().forward(images[:, :2], keep)

class Deaf(Student):
    def forward(self, images):
        return super().forward(images)

def broken():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "patches.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    doors.allow("own_nets/patches.py")
    yield
    for name in ("own_nets", "own_nets.patches"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize("place", ["own_nets.patches", "own_nets/patches.py"])
def test_a_model_of_ones_own_teaches(place):
    run = teacher_run(f"module:{place}:make", "clip_vit_base_patch16")
    assert frozen_weights(run.teacher, Sources(), where="--teacher.source") is None
    teacher = DistillationJob(run).make_teachers()[""]
    assert teacher.statistics.mean == (0.1, 0.2, 0.3)
    got = teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert got.tokens.shape == (1, 4, 12)
    assert (teacher.net.cut.weight == 0.5).all()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("own_nets.patches:none", "'none'"),
        ("own_nets.nothing:make", "own_nets.nothing"),
        ("own_nets.patches:broken", "width, num_prefix_tokens, grid"),
        ("own_nets.patches", "function"),
        ("own_nets/gone.py:make", "own_nets/gone.py"),
    ],
)
def test_what_returns_no_backbone(function, words):
    with pytest.raises(ConfigError, match=words):
        DistillationJob(teacher_run(f"module:{function}")).make_teachers()[""]


@pytest.mark.usefixtures("_own_module")
def test_a_student_gets_drop_path_and_image_size_and_what_is_optional():
    section = Student(model="module:own_nets/patches.py:Student", drop_path_rate=0.25)
    task = Task(make_student(section, image_size=32))
    assert task.drop_path_rates == (0.25,)
    assert task.student.positions.shape == (1, 16, 12)
    assert task.no_weight_decay() == (frozenset(), ())
    with pytest.raises(ConfigError, match=r"optim\.layer_decay"):
        task.layer_scale("student.positions", 0.9)


@pytest.mark.usefixtures("_own_module")
def test_a_student_without_what_training_needs():
    with pytest.raises(ConfigError, match="drop_path_rates, blocks"):
        make_student(Student(model="module:own_nets/patches.py:make"))


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("Drops", "Dropout"),
        ("whole_average", "BatchNorm1d"),
        ("untracked", "BatchNorm1d"),
        ("OwnBatches", "OwnNorm"),
    ],
)
def test_a_step_depends_on_images_weights_and_keep_alone(name, module):
    build(resolve(f"module:own_nets/patches.py:{name}"))  # A teacher's step is not trained.
    expected = rf"{module}.* \(a student may use drop path by its argument `keep` instead\)"
    with pytest.raises(ConfigError, match=expected):
        make_student(Student(model=f"module:own_nets/patches.py:{name}", init="weights.pt"))


@pytest.mark.usefixtures("_own_module")
def test_batch_norms_have_groups_of_images_in_a_student():
    """Two groups of two images, flattened with their places, are torch's norm of each."""
    model = "module:own_nets/patches.py:Batches"
    task = Task(make_student(Student(model=model), image_size=16)).train()
    group_norms(task, 2, global_batch=4, micro_batch=4)
    images = torch.randn(4, 3, 16, 16)
    plain = nn.BatchNorm1d(12)
    inputs = task.student.cut(images).flatten(2).transpose(1, 2)
    expected = [plain(half.flatten(0, 1)) for half in inputs.split(2)]
    task.before_step(0.0)
    found = task.student(images).tokens
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(expected))
    found.sum().backward()
    task.after_step()
    assert not task.student.norm.running_mean.eq(0).all()
    assert task.student.fewest_places == 4
    with pytest.raises(ConfigError, match=r"student\.norm_batch"):
        make_student(Student(model=model, norm_batch=0))
    build(resolve(model))(images)  # A teacher is as its code says.


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Bare", "Tensor"),
        ("Wide", "12"),
        ("Noisy", "rand"),
        ("Tall", r"\(4, 1\)"),
        ("Prefixed", r"\(2, 5, 12\)"),
        ("Raises", r"RuntimeError: .*patches\.py line \d+"),
        ("Deaf", "TypeError"),
    ],
)
def test_a_forward_that_returns_no_map_or_draws_is_refused(name, part):
    def check(name):
        with torch.device("meta"):
            net = make_student(Student(model=f"module:own_nets/patches.py:{name}"))
        check_map(net, 16, is_trained=True, where="student.model")

    check("Student")
    check("Valued")  # The meta device cannot run it.
    with pytest.raises(ConfigError, match=rf"student\.model.*{part}"):
        check(name)


@pytest.mark.usefixtures("_own_module")
def test_a_teacher_that_returns_no_map_is_refused():
    run = teacher_run("module:own_nets/patches.py:Deaf", "clip_vit_base_patch16")
    run = replace(run, objective=replace(run.objective, interpolation="bilinear"))
    DistillationJob(run).tensor_sizes()  # A teacher is called with images alone.
    run = teacher_run("module:own_nets/patches.py:Wide", "clip_vit_base_patch16")
    with pytest.raises(ConfigError, match=r"teacher\.source.*24"):
        DistillationJob(run).tensor_sizes()


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_tensors_are_found_by_the_models_own_names(prefix):
    architecture = resolve("module:own_nets/patches.py:Student").at(16)
    file = {f"{prefix}{n}": s for n, s in parameter_shapes(architecture).items()}
    beside = {"decoder.0.weight": (3, 12, 1, 1)} if prefix else {}
    found = family_of(architecture).matched(architecture, file | beside, "weights")
    assert {n: p.sources for n, p in found.pieces.items()} == {
        n.removeprefix(prefix): (n,) for n in file
    }
    assert found.shapes == parameter_shapes(architecture)


@pytest.mark.usefixtures("_own_module")
def test_nothing_is_imported_that_was_not_allowed():
    doors.reset()
    architecture = resolve("module:own_nets/patches.py:Student")
    assert (architecture.family, architecture.whole_first) == ("module", True)
    with pytest.raises(ConfigError, match="--allow-code"):
        build(architecture)


@pytest.mark.usefixtures("_own_module")
def test_an_installed_package_brings_a_backbone(tmp_path, monkeypatch):
    install(tmp_path, "backbones", "patches = own_nets.patches:Student")
    assert make_student(Student(model="patches")).drop_path_rates == (0.1,)
    assert resolve("patches").at(32).image_size == 32
    with pytest.raises(ConfigError, match="model"):
        resolve("patchs")
