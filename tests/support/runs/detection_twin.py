"""The detector of SwinV2-G as a command, shrunken: extra norms, sequential stages, layer decay."""

from __future__ import annotations

from pathlib import Path

from coco import annotation, write_set
from dense_runs import SMALL_GIANT

FLAGS = f"""
{SMALL_GIANT}
--recipe coco_mask_rcnn_swinv2_giant
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
