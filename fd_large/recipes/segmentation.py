"""Segmentation on ADE20K with a distilled student: UPerNet, or a linear layer.

The paper reports 49.5 mIoU for CLIP ViT-B/16, 51.7 after feature distillation (52.8 in an earlier
version) and 61.4 for SwinV2-G, and publishes no configuration. The settings here follow published
recipes of the same backbones, and each recipe names its source.

All recipes have these settings: images scaled by 0.5 to 2, crops in which no class has more than
three quarters of the pixels, flips, and photometric distortion; AdamW with betas .9/.999 and no
clipping; a learning rate that falls linearly to 0 over all steps, and in the first 1500 steps is
also multiplied by a factor that rises from a millionth to 1; an auxiliary head of weight 0.4;
losses over all pixels; 150 classes, with label 0 ignored. Images are resized with antialiasing, and
their colours are converted to HSV once, while mmsegmentation's distortion converts them twice. A
step is one micro-batch on each of 8 GPUs, and batch norms in the heads use the statistics of the
whole batch. An epoch is the 20,210 training images.

Sources: SwinTransformer/Swin-Transformer-Semantic-Segmentation @87e6f90 (configs/swin);
microsoft/unilm @768a3c8 (beit/, beit2/ semantic_segmentation); arXiv 2111.09883 (SwinV2-G).

`--student.init RUN_OR_FILE` names the backbone; without it the model starts from random weights.
Duration and memory are computed by `plan` (docs/scaling.md), not measured.
"""

from __future__ import annotations

from typing import Any

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.dataset_sizes import ADE20K
from fd_large.recipes.run import UNNAMED, Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.recipes.students import vit
from fd_large.tasks.segmentation.section import Segmentation

# 1500 steps, of 1263 (16 images) or 631 (32 images) an epoch; the half keeps the rounding down of a
# fraction of an epoch from making them 1499.
WARMUP_STEPS = 1500.5


def _ade20k(
    student: Student,
    *,
    image_size: int,
    peak: float,
    weight_decay: float,
    max_steps: int = 160_000,
    global_batch_size: int = 16,
    layer_decay: float = 1.0,
    **segmentation: Any,
) -> Run:
    base_lr = peak * 512 / global_batch_size
    section = Segmentation(num_classes=150, reduce_zero_label=True, **segmentation)
    return Run(
        name=UNNAMED,
        student=student,
        data=Data(image_size=image_size),
        # The sections of tasks are fields that are made from the table of tasks.
        task=Task(name="segmentation", segmentation=section),  # type: ignore[call-arg]
        optim=Optim(
            base_lr=base_lr,
            warmup_lr=base_lr * 1e-6,
            min_lr=0.0,
            schedule="linear",
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            max_steps=max_steps,
            warmup_epochs=WARMUP_STEPS / (ADE20K // global_batch_size),
            clip_norm=0.0,
        ),
        batch=Batch(global_batch_size=global_batch_size),
    )


def ade20k_upernet_vit_base() -> Run:
    """UPerNet on the student of CLIP ViT-B/16 (fd_clip_vit_base), the paper's comparison.

    Hardware: 8 GPUs x 2 images; ADE20K
    Duration: 160,000 steps; 18 to 28 GPU-hours
    Memory: 6.1 GB of each GPU
    Result: ADE20K 51.7 mIoU; CLIP itself 49.5 (the paper, by settings that it does not publish)

    The paper's settings are most likely those of ade20k_upernet_vit_base_mae. This recipe has the
    settings of BEiTv2's ViT-B, which was also distilled from CLIP (53.1): 512 px, 5e-5 at batch 16,
    layer decay .75, drop path .15, weight decay .05, and 768 channels. Each block has a table of
    relative positions, resized to 32 x 32 patches. Tests use windows of 512 px at a stride of 341.
    """
    return _ade20k(
        vit("vit_base_patch16", 0.15),
        image_size=512,
        peak=5e-5,
        weight_decay=0.05,
        layer_decay=0.75,
        head_width=768,
        test_mode="slide",
    )


def ade20k_upernet_vit_base_mae() -> Run:
    """UPerNet on a ViT-B/16 with the settings of MAE, whose result the paper's table also has.

    Hardware: 8 GPUs x 2 images; ADE20K
    Duration: 160,000 steps; 17 to 26 GPU-hours
    Memory: 6.1 GB of each GPU
    Result: MAE's weights 48.1 mIoU (MAE and the paper); unknown for CLIP and its student

    The paper's table has MAE's published result, 48.1, beside 49.5 for CLIP and 51.7 for its
    student, without settings. All three models were most likely trained with MAE's settings, which
    are published (arXiv 2111.06377, and in mmsegmentation): 512 px, 1e-4 at batch 16, layer decay
    .65, drop path .1, weight decay .05, 768 channels, a table of relative positions for each block,
    and tests with windows of 512 px at a stride of 341.
    """
    return _ade20k(
        vit("vit_base_patch16", 0.1),
        image_size=512,
        peak=1e-4,
        weight_decay=0.05,
        layer_decay=0.65,
        head_width=768,
        test_mode="slide",
    )


def ade20k_upernet_vit_large() -> Run:
    """UPerNet on the student of CLIP ViT-L/14 (fd_clip_vit_large).

    Hardware: 8 GPUs x 2 images; ADE20K
    Duration: 160,000 steps; 42 to 65 GPU-hours
    Memory: 10.9 GB of each GPU
    Result: not published

    The settings are BEiTv2's for a ViT-L (56.7): 4e-5 at batch 16, layer decay .9, drop path .2,
    weight decay .05, and 1024 channels. Images have 518 px, since BEiTv2's 512 px are no multiple
    of 14; the learning rate is that for 512 px.
    """
    return _ade20k(
        vit("vit_large_patch14", 0.2),
        image_size=518,
        peak=4e-5,
        weight_decay=0.05,
        layer_decay=0.9,
        head_width=1024,
        test_mode="slide",
    )


def ade20k_upernet_swinv2_base() -> Run:
    """UPerNet on a SwinV2-B, window 16 (for the student of fd_swinv2_base).

    Hardware: 8 GPUs x 2 images; ADE20K
    Duration: 160,000 steps; 12 to 18 GPU-hours
    Memory: 5.9 GB of each GPU
    Result: not published (Swin-B on labels of ImageNet-1K: 48.1)

    The settings are Swin-B's: 512 px, 6e-5 at batch 16, no layer decay, drop path .3, weight decay
    .01 (biases are not decayed here), 512 channels, and tests on whole images. At 512 px, windows
    of 16 tokens divide the maps of all four stages.
    """
    return _ade20k(
        Student(
            model="swinv2_base",
            architecture=Architecture(window_size=16),
            drop_path_rate=0.3,
            size_rule="pad",
        ),
        image_size=512,
        peak=6e-5,
        weight_decay=0.01,
    )


def ade20k_upernet_swinv2_giant() -> Run:
    """UPerNet on a SwinV2-G (3.0B), 640 px, window 40 (for the student of fd_swinv2g).

    Hardware: 32 GPUs of 80 GB x 1 image; ADE20K
    Duration: 80,000 steps; 190 to 350 GPU-hours
    Memory: 10.6 GB of each GPU
    Result: ADE20K 61.4 mIoU (paper); SwinV2-G itself 59.9, both with several scales in the test

    The settings are SwinV2's: 640 px, window 40, 4e-5 at batch 32, 80,000 steps, and drop path .4.
    Layer decay (here none), weight decay (here .05) and warm-up (here 1500 steps) are not
    published. The paper tests at 896 px with windows of 56: evaluate RUN
    --student.architecture.window_size 56 --task.segmentation.test_size 896 3584
    --task.segmentation.test_flip True, with several --task.segmentation.test_scales, which are not
    published. Every block is checkpointed. Run it with ds_configs/zero3_hpz.json.
    """
    return _ade20k(
        Student(
            model="swinv2_giant",
            architecture=Architecture(window_size=40),
            drop_path_rate=0.4,
            size_rule="pad",
            activation_checkpointing="every",
        ),
        image_size=640,
        peak=4e-5,
        weight_decay=0.05,
        max_steps=80_000,
        global_batch_size=32,
    )


def ade20k_linear() -> Run:
    """A linear layer on the last map of a frozen ViT-B/16: how well its features part classes.

    Hardware: 8 GPUs x 2 images; ADE20K
    Duration: 40,000 steps; 38 to 59 GPU-minutes
    Memory: 3.6 GB of each GPU
    Result: not published

    The settings are DINOv3's (configs/config-ade20k-linear-training.yaml): batch norm and one
    layer, 512 px, 1e-3 at batch 16, 40,000 steps, and windows at a stride of 341. Weight decay
    .001, the schedule and the crops are our choices. The student does not change, but its master
    weights and moments still take memory.
    """
    return _ade20k(
        vit("vit_base_patch16", 0.0),
        image_size=512,
        peak=1e-3,
        weight_decay=0.001,
        max_steps=40_000,
        head="linear",
        auxiliary_weight=0.0,
        frozen=True,
        test_mode="slide",
    )
