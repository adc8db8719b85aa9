"""Toy datasets in every layout that `transfer` takes, a tiny run, and flags that make it quick."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import depth_images
import detection_twin
import segmentation_twin
import tiny_runs
from labelled_folder import labelled_folder

from fd_large.recipes.architectures import Architecture

# Four stages, as pyramids need them.
SWIN = Architecture(
    embed_dim=16,
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_size=2,
    patch_size=4,
    image_size=64,
)
COLUMNS = ("finetune", "linear", "ade20k", "coco", "nyuv2")
DATASETS = ("imagenet", "ade20k", "coco", "nyuv2")
SHORT = """
--optim.max_steps 3 --optim.warmup_epochs 0 --batch.global_batch_size 4 --batch.micro_batch_size 4
--data.workers 0 --runtime.log_every 1 --runtime.save_every 1 --student.drop_path_rate 0
--linear.task.linear.norm_batch 4
--ade20k.data.image_size 64 --ade20k.task.segmentation.num_classes 4
--ade20k.task.segmentation.head_width 16
--coco.data.image_size 64 --coco.task.detection.num_classes 3 --coco.task.detection.head_width 16
--coco.task.detection.test_size 0 0 --coco.task.detection.proposals_per_image 40
--coco.task.detection.rois_per_image 16 --coco.task.detection.detections_per_image 10
--nyuv2.data.image_size 64 --nyuv2.task.depth.head_width 16 --nyuv2.task.depth.test_crop none
"""


def write_toy(folder: Path, *, count: int = 4) -> Path:
    """Writes the datasets, weights of a teacher, and FOLDER/mine, a run that distilled it.

    Args:
        folder: Where to.
        count: Images of each split, about.
    """
    labelled_folder(folder / "imagenet", train=4 * count, val=2 * count, side=40)
    segmentation_twin.write_images(folder / "ade20k", count)
    detection_twin.pictures(folder / "coco")
    depth_images.write_images(folder / "nyuv2", count)
    run = tiny_runs.tiny_run()
    run = replace(
        run,
        name="fd_swinv2_base",
        student=replace(run.student, architecture=SWIN),
        teacher=replace(run.teacher, source=str(tiny_runs.vit_file(folder))),
        data=replace(run.data, image_size=64),
    )
    tiny_runs.store_task(folder / "mine", run, tiny_runs.tiny_task(run))
    return folder


def words(toy: Path, out: Path) -> list[str]:
    """The command's arguments: all rows and columns, a few steps of each."""
    datasets = [word for name in DATASETS for word in (f"--{name}", str(toy / name))]
    return ["transfer", str(toy / "mine"), "--out", str(out), *datasets, *SHORT.split()]
