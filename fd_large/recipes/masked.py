"""Masked distillation from CLIP: published runs, as far as they are published.

EVA, dBOT and MaskAlign publish their training code. MaskDistill does not, and its settings are
those of the one open reproduction (drkostas/MaskDistill-PyTorch). Each recipe lists the differences
of this package.

Masking does not improve everything. After 300 epochs with the same teacher, the reproduction of
MaskDistill fine-tunes to 84.8 (ADE20K 52.6), and Feature Distillation without a mask to 85.0
(51.7). The linear probe reaches 76.3 for MaskDistill and 80.1 for Feature Distillation. Compare
students by k-NN, linear probe and fine-tuning (docs/masked.md).

Duration and memory are computed by `plan` (docs/scaling.md), not measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import UNNAMED, Run
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.distillation.section import AUTOMATIC, Mask, Teacher

_CLIP_OPTIMISER: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6}


def _masked(
    student: Student, teacher: str, mask: Mask, optim: Optim, batch: int, data: Data, **learnt: Any
) -> Run:
    return Run(
        name=UNNAMED,
        student=student,
        teacher=Teacher(model=teacher),
        objective=replace(AUTOMATIC, **learnt),
        mask=mask,
        data=data,
        optim=optim,
        batch=Batch(global_batch_size=batch),
    )


def maskalign_vit_base() -> Run:
    """MaskAlign: CLIP ViT-B/16 into a ViT-B/16 that encodes the visible 30% of patches, 200 epochs.

    Hardware: 8 GPUs x 128 images; CLIP ViT-B/16 weights
    Duration: 250,200 steps; 32 to 50 GPU-hours
    Memory: 6.0 GB of each GPU
    Result: ImageNet-1K fine-tuned 85.4 (its model card; five levels)

    Source: Xue et al., arXiv 2211.08887, and its code (OpenDriveLab/maskalign): AdamW with betas .9
    / .95, 6e-4 at 1,024 images, a cosine to 1e-5 after 20 epochs of warm-up, no clipping, drop path
    .1, crops from .2 of the area; smooth L1 with beta 1 on whitened tokens of visible patches and
    the class token; no decoder.
    Differences here: the student learns the last level of CLIP, while MaskAlign learns the last
    five levels by a trained mixture of the student's blocks. Patches are dropped at random, while
    MaskAlign keeps patches that CLIP attends to. Positions are trained, while MaskAlign's are
    fixed.
    Not published: k-NN, the linear probe, ADE20K.
    """
    return _masked(
        Student(model="dino_vit_base_patch16", drop_path_rate=0.1),
        "clip_vit_base_patch16",
        Mask(sampler="random", ratio=0.7, student="dropped", tokens="visible", cls=True),
        # Rates are per 512 images.
        Optim(
            base_lr=3e-4,
            warmup_lr=0.0,
            min_lr=5e-6,
            betas=(0.9, 0.95),
            clip_norm=0.0,
            epochs=200,
            warmup_epochs=20,
        ),
        1024,
        Data(min_crop_scale=0.2),
        layer="before_norm",
        beta=1.0,
    )


def maskdistill_vit_base() -> Run:
    """MaskDistill: CLIP ViT-B/16 into a ViT-B/16 behind mask tokens, 300 epochs.

    Hardware: 16 GPUs x 128 images; CLIP ViT-B/16 weights
    Duration: 187,500 steps; 92 to 140 GPU-hours
    Memory: 12.7 GB of each GPU
    Result: ImageNet-1K fine-tuned 84.8, linear 76.3, k-NN 75.6 (reproduced by others; paper: 85.3)

    Also published: ADE20K 52.6, COCO Mask R-CNN 44.4 / 40.1 in 12 epochs (the reproduction); ADE20K
    53.8 (the paper, as the reproduction quotes it). Without a mask, `fd_clip_vit_base`, the linear
    probe is at 80.1.
    Source: arXiv 2210.10615, without code, and configs/pretrain.yaml of the reproduction: AdamW
    with betas .9 / .999, 1.5e-3 at 2,048 images, a cosine to 1e-5 after 10 epochs of warm-up,
    gradients clipped at 3, drop path .1, LayerScale .1, a shared relative position bias, crops from
    .2 of the area, colour jitter .4; rectangular masks over 40% of the patches; smooth L1 with beta
    1 on tokens before CLIP's final norm, each with variance 1.
    Differences here: all tokens of the global batch have equal weight, whatever the number of GPUs.
    The loss is computed in float32, not in bfloat16.
    """
    return _masked(
        Student(model="vit_base_patch16", drop_path_rate=0.1),
        "clip_vit_base_patch16",
        Mask(sampler="block", ratio=0.4),
        Optim(base_lr=3.75e-4, warmup_lr=2.5e-6, min_lr=2.5e-6, epochs=300, warmup_epochs=10),
        2048,
        Data(min_crop_scale=0.2, color_jitter=0.4),
        layer="before_norm",
        normaliser="unbiased_whitening",
        beta=1.0,
    )


def dbot_clip_vit_base() -> Run:
    """dBOT with CLIP as its teacher: ViT-B/16 into a ViT-B/16 behind mask tokens, 1600 epochs.

    Hardware: 32 GPUs x 128 images; CLIP ViT-B/16 weights
    Duration: 499,200 steps; 500 to 780 GPU-hours
    Memory: 12.8 GB of each GPU
    Result: ImageNet-1K fine-tuned 85.7, ADE20K 52.9 (its README)

    Also published: COCO cascade 53.6 in its 3x schedule.
    Source: Liu et al., arXiv 2209.03917, and its code (liuxingbin/dbot, branch beit, PRETRAIN.md):
    AdamW with betas .9 / .98, 3e-3 at 4,096 images, 10 epochs of warm-up, gradients clipped at 3,
    drop path .1, LayerScale .1, a shared relative position bias, crops from .4 of the area, colour
    jitter .4; rectangular masks over 78 of 196 patches; the cosine loss on masked tokens.
    Differences here: the target is the map after CLIP's final norm, which dBOT projects to 512
    channels. All tokens of the global batch have equal weight.
    Not published: k-NN and the linear probe. The learning rates at the ends of the schedule are
    defaults of dBOT's code, which we have not read; ours may differ.
    """
    return _masked(
        Student(model="vit_base_patch16", drop_path_rate=0.1),
        "clip_vit_base_patch16",
        Mask(sampler="block", ratio=78 / 196),
        Optim(
            base_lr=3.75e-4,
            warmup_lr=1.25e-7,
            min_lr=1.25e-6,
            epochs=1600,
            warmup_epochs=10,
            **_CLIP_OPTIMISER,
        ),
        4096,
        Data(min_crop_scale=0.4, color_jitter=0.4),
        loss="cosine",
        normaliser="none",
    )


def eva_vit_giant() -> Run:
    """EVA: CLIP ViT-L/14 into a ViT-g/14 of 1.0 B parameters behind mask tokens, 150 epochs.

    Hardware: 128 GPUs x 32 images; CLIP ViT-L/14 weights, 29.6 M images
    Duration: 1,083,900 steps; 14,000 to 22,000 GPU-hours
    Memory: 26.5 GB of each GPU
    Result: ImageNet-1K fine-tuned 89.6 at 336 px, 89.7 at 560 (after ImageNet-21K)

    Also published: ImageNet-V2 81.6, -A 86.2, -R 88.3, -Sketch 67.7 (fine-tuned); ADE20K 62.3.
    Source: Fang et al., arXiv 2211.07636, and its code (baaivision/EVA, EVA-01/eva/README.md):
    AdamW with betas .9 / .98, 1e-3 at 4,096 images, two epochs of warm-up, gradients clipped at 3,
    drop path .1, absolute positions, no LayerScale, crops from .2 of the area; rectangular masks
    over 105 of 256 patches; the cosine loss on masked tokens.
    Differences here: the target is the map after CLIP's final norm, which EVA projects to 768
    channels. All tokens of the global batch have equal weight, while EVA weighs all GPUs equally.
    The images of CLIP and of the student are normalised by different statistics. Computation is in
    bfloat16 instead of float16.
    Not published: k-NN and the linear probe of this model (they are published for EVA-CLIP). The
    learning rates at the ends of the schedule are defaults of EVA's code, which we have not read;
    ours may differ.
    """
    return _masked(
        Student(
            model="vit_large_patch14",
            architecture=Architecture(
                embed_dim=1408,
                depths=(40,),
                num_heads=(16,),
                mlp_ratio=6144 / 1408,
                absolute_position=True,
                relative_position="none",
                layer_scale=0.0,
            ),
            drop_path_rate=0.1,
        ),
        "clip_vit_large_patch14",
        Mask(sampler="block", ratio=105 / 256),
        Optim(
            base_lr=1.25e-4,
            warmup_lr=1.25e-7,
            min_lr=1.25e-6,
            epochs=150,
            warmup_epochs=2,
            **_CLIP_OPTIMISER,
        ),
        4096,
        Data(min_crop_scale=0.2),
        loss="cosine",
        normaliser="none",
    )
