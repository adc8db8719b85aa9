"""The detector of SwinV2-G as a command, shrunken: extra norms, sequential stages, layer decay."""

from __future__ import annotations

from pathlib import Path

from coco import annotation, write_set
from launch import ROOT

FLAGS = """
--recipe coco_mask_rcnn_swinv2_giant
--student.architecture.embed_dim 16 --student.architecture.depths 1 1 2 1
--student.architecture.num_heads 1 1 2 4 --student.architecture.window_size 4
--student.architecture.extra_norm_every 2
--data.image_size 64 --data.workers 1 --runtime.log_every 1 --runtime.save_every 2
--task.detection.num_classes 3 --task.detection.head_width 16 --task.detection.test_size 0 0
--task.detection.anchors_per_image 32 --task.detection.proposals_per_image 40
--task.detection.rois_per_image 16 --task.detection.detections_per_image 10
--optim.warmup_epochs 0
"""


def pictures(root: Path, count: int = 6) -> Path:
    """Writes a set of made images of three classes, for training and for tests."""
    sizes = {number: (64, 48 + 16 * (number % 3)) for number in range(1, count + 1)}
    for split in ("train", "val"):
        annotations = [
            annotation(
                2 * number + place,
                number,
                [4 + 3 * number, 5, 20, 30 - 10 * place],
                category_id=(3, 7, 90)[(number + place) % 3],
            )
            for number in sizes
            for place in (0, 1)
        ]
        write_set(root, annotations, sizes=sizes, split=split)
    return root


def words(coco: Path, run_dir: Path, updates: int) -> list[str]:
    """The command's arguments."""
    return [
        *("--deepspeed_config", str(ROOT / "ds_configs/zero3.json"), *FLAGS.split()),
        *("--batch.global_batch_size", "4", "--batch.micro_batch_size", "1"),
        *("--data.root", str(coco), "--runtime.run_dir", str(run_dir)),
        *("--optim.max_steps", str(updates)),
    ]
