"""The depth of SwinV2-G as a command, shrunken."""

from __future__ import annotations

from pathlib import Path

from launch import ROOT

FLAGS = """
--recipe nyuv2_swinv2_giant
--student.architecture.embed_dim 16 --student.architecture.depths 1 1 2 1
--student.architecture.num_heads 1 1 2 4 --student.architecture.window_size 4
--student.architecture.pretrained_window_sizes 3 3 3 2 --student.stage_windows 4 4 4 2
--student.architecture.extra_norm_every 2
--data.image_size 64 --data.workers 1 --runtime.log_every 1 --runtime.save_every 2
--task.depth.head_width 16 --task.depth.test_crop none
--optim.warmup_epochs 1 --optim.base_lr 0.1 --optim.warmup_lr 1e-2 --optim.min_lr 1e-2
"""


def flags(root: Path, run_dir: Path, updates: int, *, ranks: int) -> list[str]:
    """The command's arguments; a step is one pass, for the batch norms."""
    return [
        *("--deepspeed_config", str(ROOT / "ds_configs/zero3.json"), *FLAGS.split()),
        *("--batch.global_batch_size", "4", "--batch.micro_batch_size", str(4 // ranks)),
        *("--data.root", str(root), "--runtime.run_dir", str(run_dir)),
        *("--optim.max_steps", str(updates)),
    ]
