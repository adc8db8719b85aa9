"""The paper's six runs, with its published settings.

Source: "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation"
(arXiv 2205.14141), its code (SwinTransformer/Feature-Distillation) and README.

All six runs have these settings: ImageNet-1K, 1,281,167 images, 224 px; a global batch of 2048 (16
GPUs x 128), so that an epoch has 1,281,167 // 2048 = 625 steps; AdamW with betas .9/.999, eps 1e-8
and weight decay .05; gradients clipped at a norm of 3.0; drop path in the student only; smooth L1
with beta 2. Learning rates are per 512 images, so that at 2048 the ViT runs peak at 3e-4 x 4 =
1.2e-3. The published runs computed in float16 autocast with a float32 residual stream. Here the
residual stream is float32, too, and matrix products are in bfloat16.

Duration and memory are computed by `plan` (docs/scaling.md), not measured. Work is FLOPs per
image (3 x student + teacher, 2 per multiply-add) x 300 x 1,281,167 images.
"""

from __future__ import annotations

from typing import Any

from fd_large.recipes.run import UNNAMED, Run
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.distillation.section import AUTOMATIC, Teacher

Rates = tuple[float, float, float]
"""Learning rates per 512 images, in the order peak, start of the warm-up, end."""

VIT_RATES = (3e-4, 5e-7, 5e-6)
SWIN_RATES = (2e-4, 1e-6, 1e-5)


def distillation(
    student: Student,
    teacher: Teacher,
    *,
    rates: Rates,
    epochs: int = 300,
    image_size: int = 224,
    min_crop_scale: float = 0.08,
    batch: Batch = Batch(global_batch_size=2048),  # noqa: B008 (frozen)
) -> Run:
    """Returns a distillation with the settings that all published distillations share."""
    base_lr, warmup_lr, min_lr = rates
    return Run(
        name=UNNAMED,
        student=student,
        teacher=teacher,
        objective=AUTOMATIC,
        data=Data(image_size=image_size, min_crop_scale=min_crop_scale),
        optim=Optim(
            base_lr=base_lr, warmup_lr=warmup_lr, min_lr=min_lr, epochs=epochs, warmup_epochs=10
        ),
        batch=batch,
    )


def _into_vit(student: str, teacher: str, *, drop_path_rate: float, **changed: Any) -> Run:
    return distillation(
        Student(model=student, drop_path_rate=drop_path_rate),
        Teacher(model=teacher),
        rates=VIT_RATES,
        **changed,
    )


def fd_clip_vit_base() -> Run:
    """OpenAI-CLIP ViT-B/16 into a ViT-B/16, 300 epochs.

    Hardware: 16 GPUs x 128 images; CLIP ViT-B/16 weights
    Duration: 187,500 steps; 91 to 140 GPU-hours
    Memory: 12.7 GB of each GPU
    Result: ImageNet-1K fine-tuned 82.9 -> 85.0 (README: 84.9)

    Also published: linear 79.5 -> 80.1, ADE20K 49.5 -> 51.7, COCO box/mask 45.0/39.8 -> 48.2/42.5.
    Work: 4 x 35.1 GFLOP x 3.84e8 images = 5.4e19 FLOP.
    """
    return _into_vit("vit_base_patch16", "clip_vit_base_patch16", drop_path_rate=0.2)


def fd_clip_vit_base_100ep() -> Run:
    """OpenAI-CLIP ViT-B/16 into a ViT-B/16, 100 epochs: larger crops, less drop path.

    Hardware: 16 GPUs x 128 images; CLIP ViT-B/16 weights
    Duration: 62,500 steps; 30 to 47 GPU-hours
    Memory: 12.7 GB of each GPU
    Result: no figure known (300 epochs: 85.0)

    A short run needs less regularisation, so that drop path is .1, and crops have at least .67 of
    the image.
    """
    return _into_vit(
        "vit_base_patch16",
        "clip_vit_base_patch16",
        drop_path_rate=0.1,
        epochs=100,
        min_crop_scale=0.67,
    )


def fd_clip_vit_large() -> Run:
    """OpenAI-CLIP ViT-L/14 into a ViT-L/14, 300 epochs.

    Hardware: 16 GPUs x 128 images; CLIP ViT-L/14 weights
    Duration: 187,500 steps; 370 to 580 GPU-hours
    Memory: 38.1 GB of each GPU
    Result: ImageNet-1K fine-tuned 86.1 -> 87.7

    Also published: 336 px with an ImageNet-22K step between, 89.0; ADE20K 53.5 -> 55.7 (from a
    summary of the paper's third version).
    Work: 4 x 162 GFLOP x 3.84e8 images = 2.5e20 FLOP.
    """
    return _into_vit("vit_large_patch14", "clip_vit_large_patch14", drop_path_rate=0.3)


def fd_dino_vit_base() -> Run:
    """DINO ViT-B/16 into a ViT-B/16, 300 epochs.

    Hardware: 16 GPUs x 128 images; DINO ViT-B/16 weights
    Duration: 187,500 steps; 85 to 130 GPU-hours
    Memory: 12.7 GB of each GPU
    Result: ImageNet-1K fine-tuned 82.8 -> 83.8

    Also published: ADE20K 46.2 -> 47.7; linear falls, 78.2 -> 76.1 (from a summary of the paper's
    third version).
    """
    return _into_vit("vit_base_patch16", "dino_vit_base_patch16", drop_path_rate=0.3)


def fd_deit_vit_base() -> Run:
    """DeiT ViT-B/16 (the plain one, without a distillation token) into a ViT-B/16, 300 epochs.

    Hardware: 16 GPUs x 128 images; DeiT-B/16 weights
    Duration: 187,500 steps; 85 to 130 GPU-hours
    Memory: 12.7 GB of each GPU
    Result: ImageNet-1K fine-tuned 81.8 -> 83.0

    Also published: ADE20K 47.0 -> 48.0 (from a summary of the paper's third version).
    """
    return _into_vit("vit_base_patch16", "deit_vit_base_patch16", drop_path_rate=0.3)


def fd_esvit_swin_base() -> Run:
    """EsViT Swin-B (V1, window 14) into a SwinV2-B with window 14, 300 epochs.

    Hardware: 16 GPUs x 128 images; EsViT Swin-B W14 weights
    Duration: 187,500 steps; 100 to 160 GPU-hours
    Memory: 16.4 GB of each GPU
    Result: ImageNet-1K fine-tuned 83.9 -> 85.1

    Also published: ADE20K 47.3 -> 48.9 (from a summary of the paper's third version).
    The learning rates (peak / start / end) are those of the paper's only Swin run: 2e-4 / 1e-6 /
    1e-5 per 512 images, which are 8e-4 / 4e-6 / 4e-5 at this batch.
    Work: 4 x 32.6 GFLOP x 3.84e8 images = 5.0e19 FLOP.
    """
    return distillation(
        Student(model="swinv2_base", drop_path_rate=0.3),
        Teacher(model="swin_base_esvit"),
        rates=SWIN_RATES,
    )
