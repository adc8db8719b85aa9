"""Zero-shot classification: class names of folders, prompts, and a student that is CLIP itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import tiny_clip
import tiny_runs
import torch
from labelled_folder import labelled_folder

import fd_large
from fd_large.cli.main import main
from fd_large.engine.find_model import find_model
from fd_large.errors import ConfigError
from fd_large.evaluation.zeroshot import imagenet_numbers, names_of, prompts_of
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Summary, Teacher
from fd_large.tasks.jobs import job_of
from fd_large.weights.resolve import Sources


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose student and head have the weights of its CLIP."""
    folder = tmp_path_factory.mktemp("zeroshot")
    theirs = tiny_clip.transformers_clip(folder / "clip")
    recipe = replace(
        tiny_runs.tiny_run(),
        student=Student(model="clip_vit_base_patch16", architecture=tiny_runs.VIT),
        teacher=Teacher(),
        objective=Objective(),
        teachers={
            "clip": NamedTeacher(
                source=str(folder / "clip"),
                targets=("map", "summary"),
                summary=Summary(layer="embedding", loss="cosine", normaliser="none"),
            )
        },
    )
    job = DistillationJob(DistillationJob(recipe).settle(Sources()))
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    task = job.make_task().eval()
    with torch.no_grad():
        net, _ = find_model(str(folder / "clip"), job_of).build()
        task.student.load_state_dict(net.state_dict())
        task.targets[1].head.weight.copy_(theirs.visual_projection.weight)
        task.targets[1].head.bias.zero_()
    tiny_runs.store_task(folder / "run", job.run, task)
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Test images of three classes, without a part to learn from."""
    root = labelled_folder(tmp_path_factory.mktemp("images"), train=3, val=12, classes=3, side=32)
    folders = sorted((root / "val").iterdir())
    for folder, name in zip(folders, ("cat", "dog", "red_house"), strict=True):
        folder.rename(root / "val" / name)
    return root / "val"


def test_it_classifies_as_the_model_does_in_python(run, images, tmp_path, capsys):
    words = ["evaluate", str(run), "--task", "zeroshot", "--data.root", str(images)]
    words += ["--data.workers", "0", "--prompts", "one", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (net,) = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    with np.load(tmp_path / "out" / "predictions.npz") as kept:
        (predicted,), labels = kept[f"predicted/{net['label']}"], kept["labels"]
    model = fd_large.load_student(run)
    text = str(run.parent / "clip")
    files = sorted(images.rglob("*.png"))
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(file) for file in files])
        found = model.zero_shot(pixels, ["cat", "dog", "red house"], text=text)
    assert (found.argmax(1).numpy() == predicted).all()
    assert [("cat", "dog", "red_house")[label] for label in labels] == [
        f.parent.name for f in files
    ]
    assert net["accuracy"] == [pytest.approx(100 * (predicted == labels).mean())]

    # Names of one's own: in another order they are other classes.
    (tmp_path / "names.txt").write_text("red house\ndog\n\ncat\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n")
    own = ["--class_names", str(tmp_path / "names.txt"), "--out", str(tmp_path / "own")]
    assert main([*words, *own, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    with np.load(tmp_path / "own" / "predictions.npz") as kept:
        (swapped,) = kept[f"predicted/{net['label']}"]
    assert (swapped == 2 - predicted).all()

    assert main([*words, "--clip", "dino"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("--clip: ")
    assert "Set --clip clip" in said
    assert main([*words, "--class_names", str(tmp_path / "prompts.txt")]) == 2
    assert "got 1 names" in capsys.readouterr().err
    assert main([*words, "--k", "3"]) == 2
    assert "--k: not used by zeroshot" in capsys.readouterr().err


def test_the_clip_stands_beside_its_student(run, images, tmp_path, capsys):
    words = ["--task", "zeroshot", "--data.root", str(images), "--data.workers", "0"]
    words += ["--prompts", "one", "--out", str(tmp_path / "out")]
    # The student is its teacher.
    folder = str(run.parent / "clip")
    assert main(["evaluate", str(run), f"{run}#clip", folder, *words]) == 0
    with np.load(tmp_path / "out" / "predictions.npz") as kept:
        student, teacher, file = (kept[name] for name in kept.files if name != "labels")
    assert (student == teacher).all()
    assert (teacher == file).all()
    capsys.readouterr()
    assert main(["evaluate", f"{run}#scratch", *words]) == 2
    assert capsys.readouterr().err.startswith("--clip: ")


def test_folders_of_imagenet_and_its_sets_have_its_names():
    open_clip = pytest.importorskip("open_clip")
    names, synsets = open_clip.IMAGENET_CLASSNAMES, timm.data.ImageNetInfo().label_names()
    assert names_of(synsets) == list(names)
    # ImageNet-V2 has numbers, which sort as texts: 0, 1, 10, 100.
    numbers = sorted(map(str, range(1000)))
    assert numbers[2] == "10"
    assert names_of(numbers)[2] == names[10]
    # ImageNet-A has 200 of the classes: nothing else is asked for.
    indices = Path(timm.data.__file__).parent / "_info/imagenet_a_indices.txt"
    subset = [int(line) for line in indices.read_text().split()]
    folders = [synsets[number] for number in subset]
    assert imagenet_numbers(folders) == subset
    assert names_of(folders) == [names[number] for number in subset]
    assert imagenet_numbers(["0", "1", "2"]) is None
    assert names_of(["red_house", "n01440764"]) == ["red house", "n01440764"]


def test_prompts():
    pytest.importorskip("open_clip")
    assert len(prompts_of("openai")) == 80
    assert len(prompts_of("simple")) == 7
    assert prompts_of("openai")[0].format("tench") == "a bad photo of a tench."
    with pytest.raises(ConfigError, match=r"^--prompts: .*got nothing_such"):
        prompts_of("nothing_such")
