"""Depth on NYUv2 with a distilled student: MIM-Depth's decoder, or a linear layer.

The paper reports CLIP ViT-B/16 0.416 m RMSE, 0.352 m after feature distillation, and publishes no
configuration. The settings here are those of MIM-Depth, whose decoder stands on SwinV2.

Common to all but the linear layer: crops of 480 of the 480 x 640 pixels, flips, changed colours, a
strip of depth in a quarter of the images (CutDepth, which here shows metres where the published
code shows millimetres modulo 256); pixels between 0 and 1; AdamW with betas .9/.999, weight decay
.05 and no clipping; a batch of 24; 25 epochs, of which 12 rise from 3e-5 to 5e-4, 12 fall back and
one stays there; each merging counts as a layer where rates decay with depth; tests by two square
windows and flip, in the crop of NYUv2. An epoch is the 24,231 training images.

Source: Xie et al., arXiv 2205.13543; SwinTransformer/MIM-Depth-Estimation @59ba08d.

The decoder's batch norms see all 24 images, where the published runs' see those of one GPU. The
published runs compute in float32; here `engine.precision` decides, which on GPUs is bfloat16 with a
float32 loss.

`--student.init RUN_OR_FILE` names the backbone; without it the model starts from random weights.
Duration and memory are computed by `plan` (docs/scaling.md), not measured.
"""

from __future__ import annotations

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import UNNAMED, Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.recipes.students import DISTILLED_AT_192, vit
from fd_large.tasks.depth.section import Depth


def _nyuv2(student: Student, *, layer_decay: float, head_width: int) -> Run:
    section = Depth(normalise=False, head_width=head_width, test_windows=2, test_crop="nyu")
    return Run(
        name=UNNAMED,
        student=student,
        data=Data(image_size=480),
        # The sections of tasks are fields that are made from the table of tasks.
        task=Task(name="depth", depth=section),  # type: ignore[call-arg]
        optim=Optim(
            base_lr=5e-4 * 512 / 24,
            warmup_lr=3e-5 * 512 / 24,
            min_lr=3e-5 * 512 / 24,
            schedule="rise_and_fall",
            layer_decay=layer_decay,
            epochs=25,
            warmup_epochs=12,
            clip_norm=0.0,
        ),
        batch=Batch(global_batch_size=24),
    )


def _swinv2(model: str, drop_path_rate: float) -> Student:
    return Student(
        model=model,
        architecture=Architecture(window_size=30, pretrained_window_sizes=DISTILLED_AT_192),
        drop_path_rate=drop_path_rate,
        size_rule="pad",
        window_rule="official",
        shift_stages=(True, True, False, False),
        stage_windows=(30, 30, 30, 15),
    )


def nyuv2_vit_base() -> Run:
    """MIM-Depth's decoder on the student of CLIP ViT-B/16 (fd_clip_vit_base).

    Hardware: 8 GPUs x 3 images; NYUv2
    Duration: 25,225 steps; 1.0 to 1.6 GPU-hours
    Memory: 4.5 GB of each GPU
    Result: NYUv2 0.352 m RMSE (paper); CLIP itself 0.416

    How the paper put a depth head on a ViT is not public; what is here is ours: the decoder on the
    last block's map after a new norm, of stride 16 where a SwinV2's has 32, so that the depth is
    doubled once less by interpolation. MIM-Depth's settings of a SwinV2-B: layer decay .9, drop
    path .3. A table of relative positions for each block, resized to 30 x 30 patches. Pixels stay
    between 0 and 1, where the student was distilled on normalised ones.
    """
    return _nyuv2(vit("vit_base_patch16", 0.3), layer_decay=0.9, head_width=128)


def nyuv2_swinv2_base() -> Run:
    """MIM-Depth's decoder on a SwinV2-B, window 30 (for the student of fd_swinv2_base).

    Hardware: 8 GPUs x 3 images; NYUv2
    Duration: 25,225 steps; 1.0 to 1.6 GPU-hours
    Memory: 5.0 GB of each GPU
    Result: not published (SwinV2-B of SimMIM: 0.304 m RMSE)

    MIM-Depth's settings of a SwinV2-B: layer decay .9, drop path .3, windows of 30, 30, 30 and 15
    after those of 12, 12, 12 and 6, no shift in the last two stages.
    """
    return _nyuv2(_swinv2("swinv2_base", 0.3), layer_decay=0.9, head_width=128)


def nyuv2_swinv2_large() -> Run:
    """MIM-Depth's decoder on a SwinV2-L, window 30 (for the student of fd_swinv2_large).

    Hardware: 8 GPUs x 3 images; NYUv2
    Duration: 25,225 steps; 1.9 to 2.9 GPU-hours
    Memory: 6.9 GB of each GPU
    Result: not published (SwinV2-L of SimMIM: 0.287 m RMSE)

    MIM-Depth's settings of a SwinV2-L: layer decay .85, drop path .5.
    """
    return _nyuv2(_swinv2("swinv2_large", 0.5), layer_decay=0.85, head_width=192)


def nyuv2_swinv2_giant() -> Run:
    """MIM-Depth's decoder on a SwinV2-G (3.0B), window 30 (for the student of fd_swinv2g).

    Hardware: 8 GPUs of 80 GB x 3 images; NYUv2
    Duration: 25,225 steps; 18 to 32 GPU-hours
    Memory: 25.0 GB of each GPU
    Result: not published

    No settings of this size are published: MIM-Depth's of a SwinV2-L (layer decay .85, drop path
    .5), with as many channels behind the decoder as the first stage has. It takes no checkpoints of
    blocks: `plan` says 25 GB for each GPU. Run it with ds_configs/zero3.json
    (slurm/nyuv2_swinv2g.sh).
    """
    return _nyuv2(_swinv2("swinv2_giant", 0.5), layer_decay=0.85, head_width=512)


def nyuv2_linear() -> Run:
    """A linear layer on the last map of a frozen ViT-B/16: how much depth its features tell.

    Hardware: 8 GPUs x 2 images; NYUv2
    Duration: 38,400 steps; 22 to 35 GPU-minutes
    Memory: 2.7 GB of each GPU
    Result: not published

    The length, batch, rate and loss (lambda .85) of DINOv3's probe (configs/config-nyu.yaml), whose
    layer sorts depth into 256 bins and whose schedule is another: here batch norm and one layer
    give the depth itself, and the rate falls in a straight line. Pixels are normalised as the
    student was distilled; no CutDepth. The student does not change, nor its memory: its masters and
    moments are kept.
    """
    section = Depth(
        head="linear", frozen=True, loss_lambda=0.85, cut_depth=0.0, test_windows=2, test_crop="nyu"
    )
    return Run(
        name=UNNAMED,
        student=vit("vit_base_patch16", 0.0),
        data=Data(image_size=480),
        task=Task(name="depth", depth=section),  # type: ignore[call-arg]
        optim=Optim(
            base_lr=3e-4 * 512 / 16,
            warmup_lr=3e-6 * 512 / 16,
            min_lr=0.0,
            schedule="linear",
            weight_decay=0.001,
            max_steps=38_400,
            warmup_epochs=1,
            clip_norm=0.0,
        ),
        batch=Batch(global_batch_size=16),
    )
