"""Detection with a distilled student: Mask R-CNN, Cascade Mask R-CNN, HTC; boxes and masks.

The paper reports 45.0 box AP and 39.8 mask AP for CLIP ViT-B/16, 48.2 and 42.5 after feature
distillation, and 64.2 box AP on test-dev for SwinV2-G. It publishes no configuration for them. The
settings here follow published recipes of the same backbones, and each recipe gives its reasons.

All recipes have these settings: large-scale jitter (.1 to 2.0), crops of one size, and flips;
AdamW; a warm-up from a thousandth of the peak learning rate, and then a cosine to a hundredth of
it, where the published schedules end, too, after steps at 8/9 and 11/12 of the run; gradients
clipped at a norm of 1.0 (our choice, since none is published). The heads are ViTDet's, with
LayerNorm: two convolutions for proposals, four convolutions and a linear layer for boxes, and four
convolutions for masks. Biases are not decayed, while detectron2 decays them. A crop that exceeds
its image is filled with grey (128) before normalisation, while ViTDet pads with 0 afterwards.

`--student.init RUN_OR_FILE` names the backbone; without it the model starts from random weights. A
window of another size than in the distillation needs no further flag, because SwinV2 computes its
position biases for the new window, from coordinates scaled by the old one. An epoch is the 118,287
images of train2017.
Duration and memory are computed by `plan` (docs/scaling.md), not measured; `plan` counts
micro-batches of one image. Work is three times the FLOPs of a forward of the backbone, pyramid and
heads (pyramid and heads of Mask R-CNN take 0.56 TFLOP at 1024 px, and 0.94 at 1536).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.dataset_sizes import COCO
from fd_large.recipes.run import UNNAMED, Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.detection.section import Detection


def _detector(
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
        name=UNNAMED,
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
    Duration: 184,800 steps; 370 to 580 GPU-hours
    Memory: 7.2 GB of each GPU
    Result: not published with these settings (ViTDet, MAE's weights: 51.6 box, 45.9 mask)

    The paper reports 48.2 box AP and 42.5 mask AP, 45.0 and 39.8 for CLIP itself, and 46.5 and 40.9
    for MAE's weights. It does not publish the settings, and no public recipe reproduces these
    results. This recipe has ViTDet's longer schedule for a ViT-B. A result above 48.2 is therefore
    no gain over the paper, and the difference from CLIP may differ from the paper's.
    coco_mask_rcnn_vit_base_12ep is probably nearer to the paper. The settings are 1024 px, windows
    of 14 tokens except in blocks 2, 5, 8 and 11, a simple pyramid, 1e-4 at batch 64, weight decay
    .1, layer decay .7, drop path .1 and 100 epochs. A window has the size of the distillation's
    grid (architecture.image_size 224 / 16), so that the shared position table fits the window.
    Work: 3 x (0.92 + 0.56) TFLOP x 1.18e7 images = 5.3e19 FLOP.
    """
    return _detector(
        Student(model="vit_base_patch16", drop_path_rate=0.1),
        batch=Batch(global_batch_size=64),
        base_lr=8e-4,
        epochs=100,
        warmup_epochs=0.135,
        weight_decay=0.1,
        layer_decay=0.7,
    )


def coco_mask_rcnn_vit_base_12ep() -> Run:
    """Mask R-CNN on the student of CLIP ViT-B/16 (fd_clip_vit_base), for 12 epochs.

    Hardware: 16 GPUs x 2 images; COCO 2017
    Duration: 44,352 steps; 45 to 70 GPU-hours
    Memory: 7.2 GB of each GPU
    Result: not published with these heads (CAE's, MAE's weights: 48.4 box, 42.6 mask)

    The schedule is that of CAE's detectors (Atten4Vis/CAE, Mask R-CNN 1x): 3e-4 at batch 32,
    divided by ten after 9 and after 11 epochs, 500 steps of warm-up from a thousandth of the rate,
    weight decay .05, layer decay .75, drop path .2, and no clipping. To judge by published results
    of MAE, the paper's results (coco_mask_rcnn_vit_base) come from a similarly short schedule.
    Model, heads, jittered crops and tests are those of coco_mask_rcnn_vit_base. CAE itself has
    images of 480 to 800 x 1333 px, attention over the whole image, a pyramid of deconvolutions,
    GIoU, and 16-bit floats.
    Work: 3 x (0.92 + 0.56) TFLOP x 1.42e6 images = 6.3e18 FLOP.
    """
    base_lr = 3e-4 * 512 / 32
    run = coco_mask_rcnn_vit_base()
    optim = replace(
        run.optim,
        base_lr=base_lr,
        warmup_lr=base_lr / 1000,
        min_lr=base_lr / 100,
        schedule="steps",
        drops=(0.75, 0.9167),
        epochs=12,
        warmup_epochs=500 / (COCO // 32),
        weight_decay=0.05,
        layer_decay=0.75,
        clip_norm=0.0,
    )
    student = replace(run.student, drop_path_rate=0.2)
    return replace(run, student=student, optim=optim, batch=Batch(global_batch_size=32))


def coco_mask_rcnn_swinv2_tiny() -> Run:
    """Mask R-CNN on a SwinV2-T, window 16.

    Hardware: 8 GPUs x 2 images; COCO 2017
    Duration: 266,112 steps; 21 to 33 GPU-hours
    Memory: 4.3 GB of each GPU
    Result: not published

    AdamW with 1e-4 at batch 16, weight decay .05, 36 epochs, and tests at 800 x 1333 are as in the
    detectors of Swin and the ablations of SwinV2. Drop path .2 is Swin-T's. Training crops have
    1024 px.
    Work: 3 x (0.21 + 0.56) TFLOP x 4.26e6 images = 9.9e18 FLOP.
    """
    return _detector(
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
    Duration: 266,112 steps; 32 to 50 GPU-hours
    Memory: 6.0 GB of each GPU
    Result: not published

    The settings are those of coco_mask_rcnn_swinv2_tiny, with drop path .3. ViTDet's Swin-B, which
    was pre-trained on labels of ImageNet-22K and has cascaded heads, reaches 53.9 box AP and 46.2
    mask AP.
    Work: 3 x (0.70 + 0.56) TFLOP x 4.26e6 images = 1.6e19 FLOP.
    """
    return replace(
        coco_mask_rcnn_swinv2_tiny(), student=_swinv2("swinv2_base", 16, drop_path_rate=0.3)
    )


def coco_mask_rcnn_swinv2_giant() -> Run:
    """Mask R-CNN on a SwinV2-G (3.0B), 1536 px, window 32 (for the student of fd_swinv2g).

    Hardware: 96 GPUs of 80 GB x 1 image; COCO 2017
    Duration: 44,352 steps; 1,100 to 1,900 GPU-hours
    Memory: 16.2 GB of each GPU
    Result: not published (paper's G, HTC++ and Objects365: 64.2 box)

    The schedule is the SwinV2 paper's on COCO: 1536 px, window 32, 6e-4 at batch 96, weight decay
    .05, 45,000 steps, and tests at 1100 px. That paper first trained on Objects365, and had
    cascaded heads, soft-NMS and several scales in the test, which this recipe has not. Its smaller
    models train the backbone at a tenth of the learning rate, which would be --optim.layer_decay 1
    --optim.backbone_rate 0.1. Here the layer decay is .87, the paper's value in classification.
    Over 50 blocks it leaves .0008 of the rate for the first block, and is the choice that may cost
    most. Drop path .3 and the average of the weights are our choices.
    Stages 1 and 2 compute their attention for few windows at a time, since the logits of one block
    of stage 1 are 9.7 GB per image in float32. Every block is checkpointed, so that a step computes
    4 times a forward of the backbone. Run it with ds_configs/zero3_hpz.json.
    Work: (4 x 51.3 + 3 x 0.94) TFLOP x 4.26e6 images = 8.9e20 FLOP.
    """
    return _detector(
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


def _with_heads(run: Run, **detection: Any) -> Run:
    """Returns a recipe of detection with changed fields in its section task.detection."""
    section = replace(run.task.detection, **detection)
    task = replace(run.task, detection=section)  # type: ignore[call-arg]
    return replace(run, task=task)


# detectron2's form, as ViTDet has it.
_VITDET: dict[str, Any] = {"heads": "cascade", "cascade_form": "detectron2", "box_loss": "l1"}
# mmdetection's, as the detectors of Swin have it.
_SWIN: dict[str, Any] = {"heads": "cascade", "box_loss": "giou", "class_agnostic": False}
# What is public of HTC++, with the box loss of its open re-builds, and their test.
_HTC_PLUS_PLUS: dict[str, Any] = {
    "box_loss": "giou",
    "extra_attention": True,
    "nms": "linear",
    "least_score": 0.001,
}


def coco_cascade_vit_base() -> Run:
    """Cascade Mask R-CNN on the student of CLIP ViT-B/16 (fd_clip_vit_base).

    Hardware: 16 GPUs x 4 images; COCO 2017
    Duration: 184,800 steps; 390 to 610 GPU-hours
    Memory: 7.4 GB of each GPU
    Result: not published (ViTDet, MAE's weights: 54.0 box, 46.7 mask)

    The settings are those of coco_mask_rcnn_vit_base, with ViTDet's cascade: detectron2's form, L1,
    and one box for each proposal. ViTDet trains both kinds of heads alike.
    Work: 3 x (0.92 + 0.88) TFLOP x 1.18e7 images = 6.4e19 FLOP.
    """
    return _with_heads(coco_mask_rcnn_vit_base(), **_VITDET)


def coco_cascade_vit_large() -> Run:
    """Cascade Mask R-CNN on the student of CLIP ViT-L/14 (fd_clip_vit_large).

    Hardware: 64 GPUs x 1 image; COCO 2017
    Duration: 184,800 steps; 1,300 to 2,000 GPU-hours
    Memory: 19.8 GB of each GPU
    Result: not published (ViTDet, MAE's weights: 57.6 box, 50.0 mask)

    The settings are ViTDet's for a ViT-L: 1e-4 at batch 64, weight decay .1, layer decay .8, drop
    path .4, and 100 epochs. The student has patches of 14 pixels and windows of 16 tokens. Five
    windows in each direction are 1120 px, to which ViTDet's 1024 px would be padded.
    Work: 3 x (4.68 + 1.12) TFLOP x 1.18e7 images = 2.1e20 FLOP.
    """
    run = _detector(
        Student(model="vit_large_patch14", drop_path_rate=0.4),
        batch=Batch(global_batch_size=64),
        base_lr=8e-4,
        epochs=100,
        warmup_epochs=0.135,
        image_size=1120,
        weight_decay=0.1,
        layer_decay=0.8,
    )
    return _with_heads(run, **_VITDET)


def coco_cascade_swinv2_base() -> Run:
    """Cascade Mask R-CNN on a SwinV2-B, window 16 (for the student of fd_swinv2_base).

    Hardware: 8 GPUs x 2 images; COCO 2017
    Duration: 266,112 steps; 46 to 72 GPU-hours
    Memory: 6.9 GB of each GPU
    Result: not published (Swin-B, labels of ImageNet-1K: 51.9 box, 45.0 mask)

    The settings are those of coco_mask_rcnn_swinv2_base, with the cascade of Swin's own detectors:
    mmdetection's form, GIoU, and a box for each class. Swin's detectors also train 36 epochs with
    1e-4 at batch 16, weight decay .05 and drop path .3, and test at 800 x 1333. They train on whole
    images of 480 to 800 px (--task.detection.whole_size 480 800 1333), while this recipe has
    jittered crops like all recipes here.
    Work: 3 x (0.70 + 1.12) TFLOP x 4.26e6 images = 2.3e19 FLOP.
    """
    return _with_heads(coco_mask_rcnn_swinv2_base(), **_SWIN)


def coco_cascade_swinv2_large() -> Run:
    """Cascade Mask R-CNN on a SwinV2-L, window 16 (for the student of fd_swinv2_large).

    Hardware: 32 GPUs x 2 images; COCO 2017
    Duration: 66,528 steps; 67 to 100 GPU-hours
    Memory: 8.6 GB of each GPU
    Result: not published (SwinV2-L with HTC++ at 1536 px: 58.8 box, 51.1 mask)

    The schedule is SwinV2's for its L: 4e-4 at batch 64, weight decay .05, and 36 epochs. SwinV2
    trains the backbone at a tenth of the learning rate; here a layer decay of .87 replaces this, as
    in coco_mask_rcnn_swinv2_giant. Drop path .4 is that of ViTDet's Swin-L. Size, window and heads
    are those of coco_cascade_swinv2_base.
    Work: 3 x (1.52 + 1.12) TFLOP x 4.26e6 images = 3.4e19 FLOP.
    """
    run = _detector(
        _swinv2("swinv2_large", 16, drop_path_rate=0.4),
        batch=Batch(global_batch_size=64),
        base_lr=3.2e-3,
        epochs=36,
        warmup_epochs=0.3,
        detection=Detection(test_size=(800, 1333)),
        layer_decay=0.87,
    )
    return _with_heads(run, **_SWIN)


def o365_cascade_swinv2_giant() -> Run:
    """Boxes of Objects365 on a SwinV2-G (3.0B), 1024 px, window 32, before COCO.

    Hardware: 96 GPUs of 80 GB x 1 image; Objects365 v2
    Duration: 67,500 steps; 940 to 1,700 GPU-hours
    Memory: 12.5 GB of each GPU
    Result: not published

    The settings are SwinV2's: 1.2e-3 at batch 96, weight decay .05, 67,500 steps (3.7 epochs of
    1.74 million images), window 32, images of "[800, 1024]", and HTC++ without masks. Without
    masks, HTC++ is a cascade with a layer of attention before the pyramid. GIoU and one box for
    each proposal are those of its open re-implementations. The paper does not explain the image
    sizes; here there are large-scale jitter and crops of 1024 px. Layer decay, drop path and the
    average of the weights are those of coco_mask_rcnn_swinv2_giant, and the warm-up takes a
    thousand steps, since none of these is published. The mask heads are not trained. The test set
    has 80,000 images: give a part of them as --eval.root.
    Run it with ds_configs/zero3_hpz.json (slurm/coco_swinv2g.sh).
    Work: (4 x 22.8 + 3 x 1.17) TFLOP x 6.48e6 images = 6.1e20 FLOP.
    """
    return _detector(
        _swinv2("swinv2_giant", 32, drop_path_rate=0.3, activation_checkpointing="every"),
        batch=Batch(global_batch_size=96, micro_batch_size=1),
        base_lr=6.4e-3,
        epochs=4,
        warmup_epochs=0.055,
        detection=Detection(
            num_classes=365, heads="cascade", sequential_stages=2, **_HTC_PLUS_PLUS
        ),
        layer_decay=0.87,
        ema_decay=0.9999,
        max_steps=67_500,
    )


def coco_htc_swinv2_giant() -> Run:
    """HTC++ on a SwinV2-G (3.0B), 1536 px, window 32, after Objects365.

    Hardware: 96 GPUs of 80 GB x 1 image; COCO 2017 and COCO-Stuff's maps
    Duration: 44,352 steps; 1,200 to 2,000 GPU-hours
    Memory: 18.1 GB of each GPU
    Result: not published (paper's G: 64.2 box; SwinV2-G: 63.1 box, 54.4 mask; several scales)

    `--student.init` is the run of o365_cascade_swinv2_giant, from which backbone, pyramid and all
    heads of the same shape start. Everything but the heads is as in coco_mask_rcnn_swinv2_giant,
    with SwinV2's schedule, by which HTC++ was trained. Public facts about HTC++ are HTC, a layer of
    attention before the pyramid, InstaBoost (copy_instances) and soft-NMS. GIoU, one box for each
    proposal, linear decay from an IoU of .5 and scores from .001 are those of the open
    re-implementations (CBNetV2, ViT-Adapter), and copied objects in half of the images are
    ViT-Adapter's. The re-implementations' box heads have batch norms, while these have LayerNorm,
    and the layer of attention has no drop path here. The semantic branch learns COCO-Stuff's maps;
    without these maps, set --task.detection.semantic_classes 0. The paper's test has several
    scales.
    Run it with ds_configs/zero3_hpz.json (slurm/coco_swinv2g.sh).
    Work: (4 x 51.3 + 3 x 3.16) TFLOP x 4.26e6 images = 9.1e20 FLOP.
    """
    return _with_heads(
        coco_mask_rcnn_swinv2_giant(),
        heads="htc",
        semantic_classes=183,
        copy_instances=0.5,
        **_HTC_PLUS_PLUS,
    )
