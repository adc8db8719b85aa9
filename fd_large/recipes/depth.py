"""Depth on NYUv2 with a distilled student: MIM-Depth's decoder, or a linear layer.

The paper reports an RMSE of 0.416 m for CLIP ViT-B/16 and of 0.352 m after feature distillation,
and publishes no configuration. The settings here are those of MIM-Depth, whose decoder was made for
SwinV2.

All recipes but the linear layer have these settings: crops of 480 x 480 of the 480 x 640 pixels,
flips, changed colours, and a strip of depth in a quarter of the images (CutDepth, which here shows
metres, while the published code shows millimetres modulo 256); pixels between 0 and 1; AdamW with
betas .9/.999, weight decay .05 and no clipping; a batch of 24; 25 epochs, in which the learning
rate rises from 3e-5 to 5e-4 for 12, falls back for 12 and stays at 3e-5 for one. With layer decay,
each patch merging counts as a layer. Tests use two square windows and flips, in the crop of NYUv2.
An epoch is the 24,231 training images.

Source: Xie et al., arXiv 2205.13543; SwinTransformer/MIM-Depth-Estimation @59ba08d.

The decoder's batch norms use the statistics of all 24 images, while those of the published runs use
the images of one GPU. The published runs compute in float32. Here `engine.precision` decides, which
on GPUs means bfloat16 with a float32 loss.

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

    How the paper attached a depth head to a ViT is not public, so the model here is our own. The
    decoder takes the last block's map after a new norm. This map has stride 16, while a SwinV2's
    has stride 32, so that the depth is doubled once less by interpolation. The settings are those
    of MIM-Depth for a SwinV2-B: layer decay .9 and drop path .3. Each block has a table of relative
    positions, resized to 30 x 30 patches. Pixels stay between 0 and 1, while the student was
    distilled on normalised pixels.
    """
    return _nyuv2(vit("vit_base_patch16", 0.3), layer_decay=0.9, head_width=128)


def nyuv2_swinv2_base() -> Run:
    """MIM-Depth's decoder on a SwinV2-B, window 30 (for the student of fd_swinv2_base).

    Hardware: 8 GPUs x 3 images; NYUv2
    Duration: 25,225 steps; 1.0 to 1.6 GPU-hours
    Memory: 5.0 GB of each GPU
    Result: not published (SwinV2-B of SimMIM: 0.304 m RMSE)

    The settings are those of MIM-Depth for a SwinV2-B: layer decay .9, drop path .3, windows of 30,
    30, 30 and 15 tokens instead of 12, 12, 12 and 6 in the distillation, and no shifted windows in
    the last two stages.
    """
    return _nyuv2(_swinv2("swinv2_base", 0.3), layer_decay=0.9, head_width=128)


def nyuv2_swinv2_large() -> Run:
    """MIM-Depth's decoder on a SwinV2-L, window 30 (for the student of fd_swinv2_large).

    Hardware: 8 GPUs x 3 images; NYUv2
    Duration: 25,225 steps; 1.9 to 2.9 GPU-hours
    Memory: 6.9 GB of each GPU
    Result: not published (SwinV2-L of SimMIM: 0.287 m RMSE)

    The settings are those of MIM-Depth for a SwinV2-L: layer decay .85 and drop path .5.
    """
    return _nyuv2(_swinv2("swinv2_large", 0.5), layer_decay=0.85, head_width=192)


def nyuv2_swinv2_giant() -> Run:
    """MIM-Depth's decoder on a SwinV2-G (3.0B), window 30 (for the student of fd_swinv2g).

    Hardware: 8 GPUs of 80 GB x 3 images; NYUv2
    Duration: 25,225 steps; 18 to 32 GPU-hours
    Memory: 25.0 GB of each GPU
    Result: not published

    No settings for this size are published. The recipe has MIM-Depth's for a SwinV2-L (layer decay
    .85, drop path .5), with as many channels after the decoder as the first stage has. Activation
    checkpointing is not needed, since `plan` expects 25 GB on each GPU. Run it with
    ds_configs/zero3.json (slurm/nyuv2_swinv2g.sh).
    """
    return _nyuv2(_swinv2("swinv2_giant", 0.5), layer_decay=0.85, head_width=512)


def nyuv2_linear() -> Run:
    """A linear layer on the last map of a frozen ViT-B/16: how much depth its features tell.

    Hardware: 8 GPUs x 2 images; NYUv2
    Duration: 38,400 steps; 22 to 35 GPU-minutes
    Memory: 2.7 GB of each GPU
    Result: not published

    Length, batch, learning rate and loss (lambda .85) are those of DINOv3's probe
    (configs/config-nyu.yaml). DINOv3's layer predicts 256 bins of depth and has another schedule.
    Here batch norm and one layer predict the depth itself, and the learning rate falls linearly.
    Pixels are normalised as in the student's distillation, and there is no CutDepth. The student
    does not change, but its master weights and moments still take memory.
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
