"""A user's words become models: of a run, of weights, by name; and what is not there is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_runs
import torch
from loading import TINY_VIT, made, saved
from stored_run import store_tensors

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.checkpoint import store
from fd_large.cli import weights
from fd_large.engine.find_model import find_model, slug, with_own_labels
from fd_large.engine.student import make_student
from fd_large.errors import ConfigError, FDError
from fd_large.recipes.architectures import overrides, resolve
from fd_large.tasks.jobs import job_of

TINY = "vit_base_patch16=random"


def test_no_two_nets_share_a_folder():
    nets = [
        replace(find_model(TINY, job_of), label=label, source=label) for label in ("a b", "a_b")
    ]
    with pytest.raises(ConfigError, match="the same model twice"):
        with_own_labels(nets)
    nets = [
        replace(find_model(TINY, job_of), label="a", source=source) for source in ("x/a", "y/a")
    ]
    assert [net.label for net in with_own_labels(nets)] == ["x/a", "y/a"]


def test_a_student_treats_odd_sizes_as_in_training(distillation) -> None:
    folder, run, task = distillation
    run = replace(
        run,
        student=replace(run.student, size_rule="pad", window_rule="official"),
        data=replace(run.data, image_size=38),
    )
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    store_tensors(folder, tensors, update=4, recipe=run.to_dict())
    trained = make_student(run.student, image_size=run.data.image_size).eval()
    trained.load_state_dict(task.student.state_dict())
    images = torch.randn(2, 3, 38, 38, generator=torch.Generator().manual_seed(0))
    net, _ = find_model(str(folder), job_of).build()
    with torch.no_grad():
        assert torch.equal(net(images).tokens, trained(images).tokens)


@pytest.mark.parametrize("part", ["", "#student", "#teacher", "#scratch"])
def test_the_models_of_a_run(distillation, part):
    folder, _, task = distillation
    found = find_model(f"{folder}{part}", job_of)
    labels = {"": "tiny", "#teacher": "tiny: teacher", "#scratch": "tiny: from scratch"}
    if part in labels:
        assert found.label == labels[part]
    assert (found.image_size, found.source) == (32, f"{folder}{part}")
    assert (found.trained_by is not None) == (part in ("", "#scratch"))
    net, statistics = found.build()
    assert not any(p.requires_grad for p in net.parameters())
    if part == "#teacher":
        # Random, and of the run's seed: the one that the run had.
        own = task.teachers.by_name[""]
        expected, statistics_then = own.net, own.statistics
    else:
        # The average of the weights, not the last ones.
        expected, statistics_then = task.student, IMAGENET
    assert statistics == statistics_then
    same = [torch.equal(p, expected.get_parameter(name)) for name, p in net.named_parameters()]
    assert all(same) == (part != "#scratch")
    assert len(same) == len(list(expected.parameters()))


def test_a_checkpoint_by_its_own_path(distillation):
    folder, run, task = distillation
    tiny_runs.store_task(folder, run, task, update=7)
    checkpoint = folder / "checkpoints" / "step_00000003"
    assert find_model(str(checkpoint), job_of).label == "tiny step_00000003"
    assert "step_00000007" in find_model(str(folder), job_of).section.source
    store.set_best(folder, 3)
    best = find_model(str(folder / "checkpoints" / "best"), job_of)
    assert best.label == "tiny step_00000003"


def test_recipe_and_weights_are_of_one_checkpoint_while_the_run_goes_on(distillation):
    folder, run, task = distillation

    def while_training(stored):
        tiny_runs.store_task(folder, run, task, update=9)
        return job_of(stored)

    found = find_model(str(folder), while_training)
    assert found.checkpoint == folder / "checkpoints" / "step_00000003"
    assert found.section.source == str(found.checkpoint)
    assert find_model(str(folder), job_of).checkpoint.name == "step_00000009"


@pytest.mark.parametrize(
    ("source", "label", "size"),
    [
        ("vit_base_patch16=random", "vit_base_patch16, random", 224),
        ("timm:test_vit=random", "test_vit, random", 160),
        ("timm:test_resnet=random", "test_resnet, random", 160),
    ],
)
def test_a_model_by_its_name(source, label, size):
    found = find_model(source, job_of)
    assert (found.label, found.image_size, found.trained_by) == (label, size, None)


def test_weights_and_other_sizes(vit_weights):
    found = find_model(str(vit_weights), job_of)
    assert (found.label, found.image_size) == ("vit", 32)
    assert found.build()[1] == OPENAI_CLIP
    larger = find_model(str(vit_weights), job_of, image_size=64)
    assert larger.image_size == 64
    assert larger.build()[0].grid(64, 64) == (8, 8)
    # Signs that mean something else in a name may stand in a path.
    for name in ("lr=1", "a#b"):
        path = vit_weights.rename(vit_weights.parent / name)
        assert find_model(str(path), job_of).label == name
        vit_weights = path


def test_what_a_bare_file_does_not_say_is_guessed_or_stated_beside_it(tmp_path, caplog):
    """No command that names models has a flag for it."""
    net = made("dino_vit_base_patch16")
    path = saved(net, tmp_path / "net.pth")
    with pytest.raises(
        FDError, match=r"got no num_heads.*weights convert .*net\.pth DIR"
    ) as caught:
        find_model(str(path), job_of)
    assert "--statistics" not in str(caught.value)
    command = ["convert", str(path), str(tmp_path / "net"), "--to", "fd"]
    assert weights.main([*command, "--architecture.num_heads", "2"]) == 0
    assert find_model(str(tmp_path / "net"), job_of).build()[1] == IMAGENET
    wide = build("dino_vit_base_patch16", replace(TINY_VIT, embed_dim=192, num_heads=(3,)))
    saved(wide, path)
    found = find_model(str(path), job_of)
    assert found.build()[1] == IMAGENET
    assert "A GUESS" in caplog.text
    assert "0.485 0.456 0.406 0.229 0.224 0.225" in caplog.text
    assert "weights convert" in caplog.text
    assert "--model.statistics" not in caplog.text
    caplog.clear()
    config = tmp_path / "net" / "config.json"
    told = json.loads(config.read_text())
    told["fd_large"] |= {"mean": OPENAI_CLIP.mean, "std": OPENAI_CLIP.std}
    config.write_text(json.dumps(told))
    assert find_model(str(tmp_path / "net"), job_of).build()[1] == OPENAI_CLIP
    assert "A GUESS" not in caplog.text


def test_the_teacher_of_a_stored_run_is_not_asked_for(distillation, tmp_path):
    folder, run, task = distillation
    state = made("dino_vit_base_patch16").state_dict()
    head = {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    torch.save(state | head, tmp_path / "vit.pth")
    teacher = replace(
        run.teacher,
        model="vit",
        source=str(tmp_path / "vit.pth"),
        architecture=overrides(resolve("dino_vit_base_patch16", TINY_VIT)),
        statistics=(),
    )
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    recipe = replace(run, teacher=teacher).to_dict()
    store_tensors(folder, tensors, update=9, recipe=recipe)
    net, statistics = find_model(f"{folder}#teacher", job_of).build()
    assert statistics == IMAGENET
    assert torch.equal(net.norm.weight, state["norm.weight"])


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("RUN#techer", "no such part.*techer.*teacher"),
        ("nothing.pth", r"nothing\.pth"),
        ("timm:vit_tinny=random", "vit_tinny"),
    ],
)
def test_what_is_not_there_is_named(distillation, source, named):
    with pytest.raises(FDError, match=named):
        find_model(source.replace("RUN", str(distillation[0])), job_of)


@pytest.mark.parametrize("label", ["..", ".", "", "/", "../.."])
def test_a_folder_that_is_named_after_a_label_is_one(label):
    assert slug(label).strip(".")
    assert "/" not in slug(label)
