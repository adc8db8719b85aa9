"""Which runs that led to a model trained on the images that a sweep holds out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fd_large.evaluation.held_out import runs_that_saw
from fd_large.recipes import registry
from fd_large.tasks.distillation.cached.files import HEADER, Header


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
    found = runs_that_saw(str(run), str(images / "train"), 0.1)
    assert found == ([f"{run} (fd_clip_vit_base)"] if saw else [])


def test_teachers_and_first_weights_count_and_so_do_checkpoints(tmp_path):
    images, other = tmp_path / "images", tmp_path / "other"
    teacher = write_run(tmp_path / "teacher", root=f"0.5 {images} + 0.5 web={other}")
    before = write_run(tmp_path / "before", root=images / "train", teacher=teacher)
    checkpoint = before / "checkpoints" / "step_00000003"
    student = write_run(tmp_path / "student", root=other, teacher=teacher, init=checkpoint)
    found = runs_that_saw(
        str(student / "checkpoints" / "step_00000001"), str(images / "train"), 0.1
    )
    assert found == [f"{before} (fd_clip_vit_base)", f"{teacher} (fd_clip_vit_base)"]
    assert runs_that_saw("", str(images), 0.1) == []
    assert runs_that_saw(f"{before}#student", str(images / "train"), 0.1) == found
    # A run that learns from stored targets learns from the teacher that gave them.
    header = Header({}, {"source": str(teacher)}, "float32", 1, 1, (1, 1), 0, "float32", {}, 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / HEADER).write_text(json.dumps(header.to_dict()))
    cached = write_run(tmp_path / "cached", root=other, teacher=f"cached:{tmp_path / 'cache'}")
    assert runs_that_saw(str(cached), str(images / "train"), 0.1) == found[1:]
    assert runs_that_saw("open_clip:ViT-B-16/openai", str(images), 0.1) == []
