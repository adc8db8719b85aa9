"""The student of a recipe as a module, and the weights that it starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loading import made

from fd_large.engine.student import (
    attention_memory,
    check_norm_batch,
    make_student,
    student_weights,
)
from fd_large.errors import ConfigError, WeightsError
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Batch, Student
from fd_large.weights.resolve import Sources

VIT = Architecture(embed_dim=32, depths=(2,), num_heads=(2,), patch_size=8)


def test_it_is_built_as_the_section_says():
    section = Student(
        model="swinv2_tiny",
        architecture=Architecture(
            embed_dim=8, depths=(1, 3), num_heads=(1, 2), window_size=4, patch_size=2
        ),
        drop_path_rate=0.3,
        size_rule="pad",
    )
    torch.manual_seed(0)
    net = make_student(section)
    assert net.drop_path_rates[-1] == pytest.approx(0.3)
    assert net.width == 16
    assert len(net.blocks()) == 4
    assert net(torch.zeros(1, 3, 36, 36)).grid == (9, 9)  # 18 by 18 patches, padded to windows.


def of_batch(batch=64, micro_batch="auto", model="timm:resnet18", size=64, **student):
    """A run of a student with batch norms, from random weights."""
    run = registry.get("quickstart")
    return replace(
        run,
        student=Student(model=model, **student),
        data=replace(run.data, image_size=size),
        batch=Batch(global_batch_size=batch, micro_batch_size=micro_batch),
    )


def check(run, world_size):
    size = run.data.image_size
    check_norm_batch(
        run.student, run.norm_batch(), run.batch, image_size=size, world_size=world_size
    )


@pytest.mark.parametrize(
    ("batch", "student", "images"),
    [
        (256, {}, 32),
        (100, {}, 25),
        (16, {}, 16),
        (97, {}, 97),
        (2 * 97, {}, 97),
        (4, {}, 4),
        (256, {"norm_batch": 8}, 8),
        (4, {"norm_batch": 8}, 4),
        (256, {"init": "resnet18.pth"}, 0),
        (256, {"init": "resnet18.pth", "norm_batch": 64}, 64),
    ],
)
def test_images_that_share_statistics(batch, student, images):
    assert of_batch(batch, **student).norm_batch() == images


@pytest.mark.parametrize(
    ("world_size", "run", "field"),
    [
        (1, of_batch(64, norm_batch=24), "student.norm_batch"),
        (2, of_batch(64, 16), "batch.micro_batch_size"),
        (2, of_batch(64, 8, norm_batch=16), "batch.micro_batch_size"),
        (1, of_batch(64, norm_batch=8, size=32), "student.norm_batch"),
    ],
)
def test_a_batch_that_would_divide_groups_is_refused(world_size, run, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        check(run, world_size)


@pytest.mark.parametrize(
    ("run", "remedy"),
    [
        (of_batch(15, norm_batch=2), r"--student\.norm_batch 3\."),
        (of_batch(64, norm_batch=8, size=32), r"--student\.norm_batch 16, "),
        (of_batch(8, size=32), r"--batch\.global_batch_size 16, "),
    ],
)
def test_the_remedy_is_one_that_is_taken(run, remedy):
    with pytest.raises(ConfigError, match=f"Set {remedy}"):
        check(run, 1)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        (1, of_batch(64, 32)),
        (4, of_batch(64, 16)),  # Each rank's whole share: a group lies on two ranks.
        (2, of_batch(64, "auto")),
        (2, of_batch(64, 16, norm_batch=16)),
        (2, of_batch(64, 8, model="timm:convnextv2_atto")),
        (1, of_batch(64, 16, init="resnet18.pth")),
    ],
)
def test_a_batch_of_whole_groups_is_taken(world_size, run):
    check(run, world_size)


@pytest.mark.parametrize("size", [0, 32, 48])
def test_tables_are_made_for_the_images(size):
    section = Student(model="dino_vit_base_patch16", architecture=VIT)
    net = make_student(section, image_size=size)
    assert net.pos_embed.shape[1] == 1 + ((size or 224) // 8) ** 2


def test_weights_of_a_file_and_what_the_task_does_without(tmp_path):
    net = made("dino_vit_base_patch16")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    section = Student(
        model="dino_vit_base_patch16", architecture=VIT, init=str(tmp_path / "net.pth")
    )
    found = dict(student_weights(section, Sources(), image_size=32))
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())
    assert len(found) == len(net.state_dict())
    without = dict(
        student_weights(section, Sources(), image_size=32, without=("norm.weight", "norm.bias"))
    )
    assert found.keys() - without.keys() == {"norm.weight", "norm.bias"}
    # Tables of positions are resized to the images.
    larger = dict(student_weights(section, Sources(), image_size=64))
    assert larger["pos_embed"].shape[1] == 1 + 64
    assert student_weights(Student(model="swinv2_tiny"), Sources()) is None


def test_another_model_is_refused(tmp_path):
    torch.save(made("dino_vit_base_patch16").state_dict(), tmp_path / "net.pth")
    section = Student(model="dino_vit_base_patch16", init=str(tmp_path / "net.pth"))
    with pytest.raises(WeightsError, match=r"student\.init"):
        student_weights(section, Sources(), image_size=224)


@pytest.mark.parametrize(
    ("wanted", "device", "found"),
    [
        ("auto", "cpu", "keep"),
        ("auto", "cuda", "recompute"),
        ("recompute", "cpu", "recompute"),
        ("keep", "cpu", "keep"),
        ("keep", "cuda", None),
    ],
)
def test_attention_maps_are_kept_where_memory_is_the_hosts(monkeypatch, wanted, device, found):
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    if found is None:
        with pytest.raises(ConfigError, match=r"student\.attention_memory"):
            attention_memory(wanted)
    else:
        assert attention_memory(wanted) == found
