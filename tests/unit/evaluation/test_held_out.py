"""Which trainings that led to a model had the images that a sweep holds out."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fd_large.data.folder import ImageFolder
from fd_large.data.val_fraction import Part, places_of
from fd_large.evaluation.held_out import Seen, seen_by
from fd_large.recipes import registry
from fd_large.tasks.distillation.cached.files import HEADER, Header


def runs_that_saw(source, folder):
    """The trainings that had images of a folder; of runs, the paths decide."""
    images = SimpleNamespace(root=folder, fingerprint="of no export")
    return list(seen_by(source, images, 0.1).by)


def write_run(folder, *, root, teacher="", init="", val_fraction=0.0):
    """Writes the recipe of a run, as it stands in its folder."""
    run = registry.get("fd_clip_vit_base")
    run = replace(
        run,
        data=replace(run.data, root=str(root), val_fraction=val_fraction),
        teacher=replace(run.teacher, source=str(teacher)),
        student=replace(run.student, init=str(init)),
    )
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(run.to_dict()))
    return folder


@pytest.mark.parametrize(
    ("root", "val_fraction", "saw"),
    [
        ("train", 0.0, True),
        ("", 0.0, True),
        ("train/dogs", 0.0, True),
        ("val", 0.0, False),
        ("elsewhere", 0.0, False),
        ("train", 0.1, False),
        ("train", 0.2, False),
        ("train", 0.05, True),
        # The names of the files are others there.
        ("", 0.1, True),
    ],
)
def test_datasets_are_compared_by_their_paths(tmp_path, root, val_fraction, saw):
    images = tmp_path / "images"
    run = write_run(tmp_path / "run", root=images / root, val_fraction=val_fraction)
    found = runs_that_saw(str(run), str(images / "train"))
    assert found == ([f"{run} (fd_clip_vit_base)"] if saw else [])


def test_teachers_and_first_weights_count_and_so_do_checkpoints(tmp_path):
    images, other = tmp_path / "images", tmp_path / "other"
    teacher = write_run(tmp_path / "teacher", root=f"0.5 {images} + 0.5 web={other}")
    before = write_run(tmp_path / "before", root=images / "train", teacher=teacher)
    checkpoint = before / "checkpoints" / "step_00000003"
    student = write_run(tmp_path / "student", root=other, teacher=teacher, init=checkpoint)
    found = runs_that_saw(str(student / "checkpoints" / "step_00000001"), str(images / "train"))
    assert found == [f"{before} (fd_clip_vit_base)", f"{teacher} (fd_clip_vit_base)"]
    assert runs_that_saw("", str(images)) == []
    assert runs_that_saw(f"{before}#student", str(images / "train")) == found
    # A run that learns from stored targets learns from the teacher that gave them.
    header = Header({}, {"source": str(teacher)}, "float32", 1, 1, (1, 1), 0, "float32", {}, 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / HEADER).write_text(json.dumps(header.to_dict()))
    cached = write_run(tmp_path / "cached", root=other, teacher=f"cached:{tmp_path / 'cache'}")
    assert runs_that_saw(str(cached), str(images / "train")) == found[1:]
    assert runs_that_saw("open_clip:ViT-B-16/openai", str(images)) == []


@pytest.fixture
def images(tmp_path):
    """Forty images of two classes, of which some are held out."""
    for number in range(40):
        file = tmp_path / "images" / "train" / f"class_{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return ImageFolder(str(tmp_path / "images" / "train"))


def write_export(folder, *trained_by):
    """Writes the configuration of an export that tells of trainings: (recipe, images, ...)."""
    names = ("recipe", "images", "fingerprint", "val_fraction")
    runs = [{"weights": "", **dict(zip(names, run, strict=True))} for run in trained_by]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"fd_large": {"trained_by": runs}}))
    return folder


def test_exports_are_compared_by_the_listings_of_their_images(tmp_path, images):
    part = Part(images, places_of(images, "train", 0.1, where="data.root"))
    cases = {
        (images.fingerprint, 0.0): "saw",
        (part.fingerprint, 0.1): "new",
        (part.fingerprint, 0.0): "unknown",
        ("another", 0.0): "unknown",
        ("", 0.0): "unknown",
    }
    for number, ((fingerprint, held_out), expected) in enumerate(cases.items()):
        export = write_export(tmp_path / str(number), ("fd", ["train"], fingerprint, held_out))
        named = (f"{export} (fd)",)
        found = seen_by(str(export), images, 0.1)
        assert found == {"saw": Seen(by=named), "new": Seen()}.get(expected, Seen((), named))
    # Two trainings by one recipe have one name, and one of them is enough.
    export = write_export(
        tmp_path / "twice",
        ("fd", ["train"], images.fingerprint, 0.0),
        ("fd", ["train"], part.fingerprint, 0.1),
        ("fd", ["more"], "another", 0.0),
    )
    assert seen_by(str(export), images, 0.1) == Seen(by=(f"{export} (fd)",))
    # A run that held out less than the sweep does had some of its images.
    some = Part(images, places_of(images, "train", 0.05, where="data.root"))
    export = write_export(tmp_path / "some", ("fd", ["train"], some.fingerprint, 0.05))
    assert seen_by(str(export / "model.safetensors"), images, 0.1).by


def test_the_trainings_of_teachers_go_on_through_an_export(tmp_path, images):
    export = write_export(
        tmp_path / "teacher",
        ("fd_dino_vit_base", ["web"], "another", 0.0),
        ("finetune", ["train"], images.fingerprint, 0.0),
    )
    student = write_run(tmp_path / "student", root=tmp_path / "other", teacher=export)
    found = seen_by(str(student), images, 0.1)
    assert found.by == (f"{export} (finetune)",)
    assert found.not_known == (f"{export} (fd_dino_vit_base)",)


@pytest.mark.parametrize(
    "own", [[], {}, {"trained_by": 3}, {"trained_by": [3, {"recipe": "x"}]}, None, "text"]
)
def test_of_weights_from_elsewhere_nothing_is_known(tmp_path, images, own):
    (tmp_path / "config.json").write_text(json.dumps({"fd_large": own}))
    for source in (str(tmp_path), str(tmp_path / "file.pt"), "open_clip:ViT-B-16/openai"):
        assert seen_by(source, images, 0.1) == Seen((), (source,))
    for source in ("", "random"):
        assert seen_by(source, images, 0.1) == Seen()
