"""The depth of SwinV2-G as a command, shrunken."""

from __future__ import annotations

from dense_runs import SMALL_GIANT, flags_of

FLAGS = f"""
{SMALL_GIANT}
--recipe nyuv2_swinv2_giant
--student.architecture.pretrained_window_sizes 3 3 3 2 --student.stage_windows 4 4 4 2
--task.depth.head_width 16 --task.depth.test_crop none
--optim.warmup_epochs 1 --optim.base_lr 0.1 --optim.warmup_lr 1e-2 --optim.min_lr 1e-2
"""

flags = flags_of(FLAGS)
