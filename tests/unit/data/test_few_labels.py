"""Which of the labelled images are learnt from, where some are asked for."""

from __future__ import annotations

import io
import shutil
import tarfile

import numpy as np
from labelled_folder import labelled_folder

from fd_large.data.few_labels import few_labels
from fd_large.data.labelled import open_split
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.tasks.jobs import job_of


def chosen(root, *, val_fraction=0.0, **few):
    """The images of a part, by their paths in the dataset."""
    usual = {"fraction": 1.0, "per_class": 0, "seed": 0}
    images = few_labels(open_split(str(root), "train", val_fraction=val_fraction), **usual | few)
    assert len(images.labels) == len(images)
    return [images[i].removeprefix(str(root)) for i in range(len(images))], images


def test_a_share_or_some_of_each_class_by_their_names(tmp_path):
    root = labelled_folder(tmp_path / "a", train=60, val=4, classes=3, side=4)
    everything, whole = chosen(root)
    assert whole is few_labels(whole, fraction=1.0, per_class=0, seed=3)
    tenth, images = chosen(root, fraction=0.1)
    assert np.bincount(images.labels).tolist() == [2, 2, 2]
    assert images.classes == whole.classes
    assert images.fingerprint != whole.fingerprint
    assert tenth == sorted(tenth)
    few, images = chosen(root, per_class=5)
    assert np.bincount(images.labels).tolist() == [5, 5, 5]
    assert set(tenth) < set(few) < set(everything), "with more come the same ones"
    assert np.bincount(chosen(root, fraction=0.01)[1].labels).tolist() == [1, 1, 1]
    assert chosen(root, per_class=5, seed=1)[0] != few
    # Neither the place of the folder nor images that are added to it move any.
    moved = shutil.copytree(root, tmp_path / "b")
    assert chosen(moved, per_class=5)[0] == few


def test_where_a_folder_without_parts_lies_does_not_matter(tmp_path):
    root = labelled_folder(tmp_path / "a", train=60, val=4, classes=3, side=4) / "train"
    few, _ = chosen(root, val_fraction=0.2, per_class=5)
    moved = shutil.copytree(root, tmp_path / "b")
    assert chosen(moved, val_fraction=0.2, per_class=5)[0] == few
    # They are those of the whole folder, as far as these are not held out.
    learnt = set(chosen(root, val_fraction=0.2)[0])
    of_whole = {name.removeprefix("/train") for name in chosen(root.parent, per_class=5)[0]}
    assert learnt & of_whole <= set(few)
    assert learnt & of_whole


def test_tar_files_give_the_images_of_their_folder_wherever_they_lie(tmp_path):
    root = labelled_folder(tmp_path / "a", train=30, val=6, classes=3, side=4)
    few = [name.removeprefix("/train/") for name in chosen(root, per_class=3)[0]]
    for place in ("b", "c/d"):
        packed = tmp_path / place
        for part in ("train", "val"):
            (packed / part).mkdir(parents=True)
            with tarfile.open(packed / part / "0.tar", "w") as shard:
                for file in sorted((root / part).rglob("*.png")):
                    name = file.relative_to(root / part)
                    shard.add(file, str(name))
                    label = file.parent.name.removeprefix("class").encode()
                    header = tarfile.TarInfo(str(name.with_suffix(".cls")))
                    header.size = len(label)
                    shard.addfile(header, io.BytesIO(label))
        found, _ = chosen(packed, per_class=3)
        assert [name.removeprefix("/train/0.tar/") for name in found] == few


def test_a_fine_tuning_learns_from_them_and_is_tested_on_all(tmp_path):
    root = labelled_folder(tmp_path, train=60, val=9, classes=3, side=4)
    run = override(
        registry.get("finetune_clip_vit_base"),
        {"data.root": str(root), "data.per_class": 4, "data.label_seed": 2},
    )
    job = job_of(run)
    assert len(job.open_samples()) == 12
    assert len(job.test_images()) == 9
    names = [job.open_samples()[i] for i in range(12)]
    assert [n.removeprefix(str(root)) for n in names] == chosen(root, per_class=4, seed=2)[0]
