"""Detection on COCO with a distilled student: Mask R-CNN, boxes and masks.

The paper reports CLIP ViT-B/16 45.0 box and 39.8 mask AP, 48.2 and 42.5 after feature distillation,
and 64.2 box AP on test-dev for SwinV2-G, and publishes no configuration of either. The settings
here follow the published recipes of the same backbones, each with its reason.

Common to all: large-scale jitter (.1 to 2.0), crops of one size, flips; AdamW; a cosine instead of
steps down at 8/9 and 11/12 of the run, ending where those end, at a hundredth of the peak; warm-up
from a thousandth of it; gradients clipped at a norm of 1.0 (ours: none is published). Heads as
ViTDet's: two convolutions for proposals; four and a linear layer for boxes; four for masks;
LayerNorm.

`--student.init RUN_OR_FILE` names the backbone; without it the model starts from random weights. A
window other than that of the distillation needs nothing more: SwinV2's position biases are computed
anew, on coordinates scaled by the window of the file. An epoch is the 118,287 images of train2017.
Durations are calculated, at an assumed 200 TFLOP/s per GPU: 3 forward passes' worth of backbone and
heads (0.56 TFLOP at 1024 px, 0.94 at 1536).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.detection.section import Detection


def _mask_rcnn(
    name: str,
    student: Student,
    *,
    batch: Batch,
    base_lr: float,
    epochs: int,
    warmup_epochs: float,
    image_size: int = 1024,
    detection: Detection = Detection(),  # noqa: B008 (frozen)
    **optim: Any,
) -> Run:
    return Run(
        name=name,
        student=student,
        data=Data(image_size=image_size),
        # The sections of tasks are fields that are made from the table of tasks.
        task=Task(name="detection", detection=detection),  # type: ignore[call-arg]
        optim=Optim(
            base_lr=base_lr,
            warmup_lr=base_lr / 1000,
            min_lr=base_lr / 100,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            clip_norm=1.0,
            **optim,
        ),
        batch=batch,
    )


def _swinv2(model: str, window_size: int, drop_path_rate: float, **student: Any) -> Student:
    return Student(
        model=model,
        architecture=Architecture(window_size=window_size),
        drop_path_rate=drop_path_rate,
        size_rule="pad",
        **student,
    )


def coco_mask_rcnn_vit_base() -> Run:
    """Mask R-CNN on the student of CLIP ViT-B/16 (fd_clip_vit_base), the paper's comparison.

    Hardware: 16 GPUs x 4 images; COCO 2017
    Duration: 184,800 steps; about 73 GPU-hours
    Result: COCO 48.2 box, 42.5 mask AP; CLIP itself 45.0, 39.8

    The paper's settings are not published. These are ViTDet's for a ViT-B (which gives 51.6 and
    45.9 with MAE's weights): 1024 px, windows of 14 tokens except in blocks 2, 5, 8 and 11, a
    simple pyramid, 1e-4 at batch 64, weight decay .1, layer decay .7, drop path .1, 100 epochs.
    The window is the grid of the distillation (architecture.image_size 224 / 16), so that the
    shared position table fits inside it.
    Duration: 3 x (0.92 + 0.56) TFLOP x 1.18e7 images = 5.3e19 FLOP.
    """
    return _mask_rcnn(
        "coco_mask_rcnn_vit_base",
        Student(model="vit_base_patch16", drop_path_rate=0.1),
        batch=Batch(global_batch_size=64),
        base_lr=8e-4,
        epochs=100,
        warmup_epochs=0.135,
        weight_decay=0.1,
        layer_decay=0.7,
    )


def coco_mask_rcnn_swinv2_tiny() -> Run:
    """Mask R-CNN on a SwinV2-T, window 16.

    Hardware: 8 GPUs x 2 images; COCO 2017
    Duration: 266,112 steps; about 14 GPU-hours
    Result: not published

    AdamW 1e-4 at batch 16, weight decay .05, 36 epochs, tests at 800 x 1333, as in the detectors of
    Swin and the ablations of SwinV2; drop path .2, as Swin-T's; training crops of 1024 px.
    Duration: 3 x (0.21 + 0.56) TFLOP x 4.26e6 images = 9.9e18 FLOP.
    """
    return _mask_rcnn(
        "coco_mask_rcnn_swinv2_tiny",
        _swinv2("swinv2_tiny", 16, drop_path_rate=0.2),
        batch=Batch(global_batch_size=16),
        base_lr=3.2e-3,
        epochs=36,
        warmup_epochs=0.07,
        detection=Detection(test_size=(800, 1333)),
    )


def coco_mask_rcnn_swinv2_base() -> Run:
    """Mask R-CNN on a SwinV2-B, window 16 (for the student of fd_swinv2_base).

    Hardware: 8 GPUs x 2 images; COCO 2017
    Duration: 266,112 steps; about 22 GPU-hours
    Result: not published

    As coco_mask_rcnn_swinv2_tiny, with drop path .3. ViTDet's Swin-B, pre-trained on labels of
    ImageNet-22K and with cascaded heads, has 53.9 box and 46.2 mask AP.
    Duration: 3 x (0.70 + 0.56) TFLOP x 4.26e6 images = 1.6e19 FLOP.
    """
    return replace(
        coco_mask_rcnn_swinv2_tiny(),
        name="coco_mask_rcnn_swinv2_base",
        student=_swinv2("swinv2_base", 16, drop_path_rate=0.3),
    )


def coco_mask_rcnn_swinv2_giant() -> Run:
    """Mask R-CNN on a SwinV2-G (3.0B), 1536 px, window 32 (for the student of fd_swinv2g).

    Hardware: 96 GPUs of 80 GB x 1 image; COCO 2017
    Duration: 44,352 steps; about 1,230 GPU-hours
    Result: not published (paper's G, HTC++ and Objects365: 64.2 box)

    The SwinV2 paper's schedule on COCO: 1536 px, window 32, 6e-4 at batch 96, weight decay .05,
    45,000 steps, tests at 1100 px. The paper first trained on Objects365, with cascaded heads,
    soft-NMS and several scales in the test, which are not here. Its smaller models train the
    backbone at a tenth of the learning rate: here layer decay .87, its value in classification.
    Drop path .3 and the average of the weights are ours.
    Stages 1 and 2 compute their attention for few windows at a time: the logits of one block of
    stage 1 are 9.7 GB per image in float32. Every block is checkpointed: 4 forward passes' worth.
    Run it with ds_configs/zero3_hpz.json.
    Duration: (4 x 51.3 + 3 x 0.94) TFLOP x 4.26e6 images = 8.9e20 FLOP.
    """
    return _mask_rcnn(
        "coco_mask_rcnn_swinv2_giant",
        _swinv2("swinv2_giant", 32, drop_path_rate=0.3, activation_checkpointing="every"),
        batch=Batch(global_batch_size=96, micro_batch_size=1),
        base_lr=3.2e-3,
        epochs=36,
        warmup_epochs=1.0,
        image_size=1536,
        detection=Detection(test_size=(1100, 1833), sequential_stages=2),
        layer_decay=0.87,
        ema_decay=0.9999,
    )
