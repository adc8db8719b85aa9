"""Sets whose labels are maps into a model's classes, in small folders of the same layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import tiny_runs
from labelled_folder import labelled_folder
from loading import scattered

from fd_large.cli.main import main
from fd_large.errors import DataError
from fd_large.evaluation.robustness import best_of, columns_of, open_set
from fd_large.recipes import registry
from fd_large.recipes.sections import Data, Student
from fd_large.tasks.classification.job import FineTuningJob

INFO = Path(timm.data.__file__).parent / "_info"
SYNSETS = timm.data.ImageNetInfo().label_names()


def write_images(root, *names):
    """Empty files, which have names and classes and are not read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return str(root)


def write_objectnet(root):
    """Three classes of ObjectNet's layout: of one class of ImageNet, of two, and of none."""
    write_images(root / "images", "alarm/1.png", "chair/1.png", "chair/2.png", "cork/1.png")
    lines = ["analog clock", "digital clock", "rocking chair"]
    maps = {
        "folder_to_objectnet_label": {"alarm": "Alarm", "chair": "Chair", "cork": "Cork"},
        "objectnet_to_imagenet_1k": {"Alarm": "analog clock; digital clock", "Chair": lines[2]},
        # Line 0 is class 409, and so on.
        "pytorch_to_imagenet_2012_id": {"409": 0, "530": 1, "765": 2},
    }
    (root / "mappings").mkdir()
    (root / "mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    for name, content in maps.items():
        (root / "mappings" / f"{name}.json").write_text(json.dumps(content))
    return str(root)


def test_columns_that_a_set_lacks_are_left_out_before_the_best_is_taken():
    logits = np.array([[9, 1, 2, 0], [0, 3, 2, 9], [1, 2, 9, 3]], np.float32)
    right = [(1,), (1,), (2,)]
    labels, predicted = best_of(logits, right, all_classes=False)
    assert labels.tolist() == [1, 1, 2]
    assert predicted.tolist() == [2, 1, 2]
    _, predicted = best_of(logits, right, all_classes=True)
    assert predicted.tolist() == [0, 3, 2]


def test_any_of_several_right_classes_counts_and_an_image_without_one_does_not():
    logits = np.array([[9, 1, 2], [1, 9, 2], [0, 1, 9]], np.float32)
    labels, predicted = best_of(logits, [(1, 0), (2,), ()], all_classes=True)
    assert labels.tolist() == [1, 2, -1]
    assert predicted.tolist() == [1, 1, 2]


def test_numbers_of_imagenet_v2_sort_as_texts(tmp_path):
    root = write_images(tmp_path / "v2", *(f"{number}/1.png" for number in range(1000)))
    found = columns_of(open_set(root, "folders"), SYNSETS)
    # 0, 1, 10, 100, 101 ...
    assert found[:4] == [(0,), (1,), (10,), (100,)]


def test_synsets_are_columns_of_a_model_of_other_classes_too(tmp_path):
    root = write_images(tmp_path, f"{SYNSETS[11]}/1.png", f"{SYNSETS[6]}/1.png")
    found = open_set(root, "folders")
    assert sorted(columns_of(found, SYNSETS)) == [(6,), (11,)]
    assert sorted(columns_of(found, sorted([SYNSETS[11], SYNSETS[3], SYNSETS[6]]))) == [(1,), (2,)]
    for classes in (SYNSETS[:7], ("cat", "dog")):
        with pytest.raises(DataError, match=r"^data\.root: classes that the model"):
            columns_of(found, classes)


def test_objectnet_has_the_classes_that_are_imagenets(tmp_path):
    found = open_set(write_objectnet(tmp_path), "folders")
    assert [image.rpartition("images/")[2] for image in (found.images[i] for i in range(3))] == [
        "alarm/1.png",
        "chair/1.png",
        "chair/2.png",
    ]
    assert (len(found.images), found.all_classes) == (3, False)
    assert columns_of(found, SYNSETS) == [(409, 530), (765,), (765,)]
    (tmp_path / "mappings/objectnet_to_imagenet_1k.json").write_text('{"Alarm": "no such"}')
    with pytest.raises(DataError, match="not ObjectNet's class mappings"):
        open_set(str(tmp_path), "folders")


def test_real_labels_follow_the_names_of_the_files(tmp_path):
    of_number = json.loads((INFO / "imagenet_real_labels.json").read_text())
    several = next(i for i, labels in enumerate(of_number) if len(labels) > 1)
    none = next(i for i, labels in enumerate(of_number) if not labels)
    names = [f"{SYNSETS[0]}/ILSVRC2012_val_{several + 1:08d}.JPEG"]
    names += [f"{SYNSETS[1]}/ILSVRC2012_val_{none + 1:08d}.JPEG"]
    found = open_set(write_images(tmp_path, *names), "real")
    assert columns_of(found, SYNSETS) == [tuple(of_number[several]), ()]
    assert found.all_classes
    write_images(tmp_path, f"{SYNSETS[1]}/cat.JPEG")
    with pytest.raises(DataError, match=r"^--labels: .*got cat\.JPEG"):
        open_set(str(tmp_path), "real")


def test_a_fine_tuned_model_beside_another_on_a_set(tmp_path, capsys):
    learnt = labelled_folder(tmp_path / "learnt", train=6, val=6, classes=3, side=40)
    run = replace(
        registry.get("finetune_clip_vit_base"),
        student=Student(model="vit_base_patch16", architecture=tiny_runs.VIT),
        data=Data(root=str(learnt), image_size=32, workers=0),
    )
    for seed in (3, 4):
        task = scattered(FineTuningJob(run).make_task(), seed=seed).eval()
        tiny_runs.store_task(tmp_path / f"run_{seed}", run, task)
    # Two of the three classes.
    tested = labelled_folder(tmp_path / "tested", train=2, val=10, classes=2, side=40) / "val"
    words = ["evaluate", str(tmp_path / "run_3"), str(tmp_path / "run_4"), "--task", "robustness"]
    words += ["--data.root", str(tested), "--data.workers", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    with np.load(tmp_path / "out" / "predictions.npz") as kept:
        labels, (first,) = kept["labels"], kept["predicted/run_3"]
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert set(first.tolist()) <= {0, 1}
    assert summary["nets"][0]["accuracy"] == [pytest.approx(100 * (first == labels).mean())]
    assert "difference" in summary["nets"][1]
    capsys.readouterr()
    assert main(["evaluate", "timm:test_vit=random", *words[3:]]) == 2
    assert "has no classifier of its own" in capsys.readouterr().err
