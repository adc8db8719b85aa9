"""Fine-tuning on ImageNet: the paper's students, SwinV2 up to 3B, and CLIP itself.

If a recipe names no other source, its settings are from the configurations of
SwinTransformer/Feature-Distillation (finetune/*.yaml) and its README.

The six students of these configurations have common settings: 224 px; AdamW with betas .9/.999 and
weight decay .05; gradients clipped at a norm of 5.0; equal learning rates at the start of the
warm-up and at the end of the cosine; 100 epochs with a warm-up of 20 (50 with 5 for the large
model); RandAugment m9-mstd0.5-inc1, erasing .25, mixup .8, CutMix 1.0 (switched at .5), smoothing
.1; tests on the centre crop of images resized to 256/224 of the size, bicubic; 128 images on each
of 16 GPUs (README, and finetune/*esvit*.yaml). Each block has its own position table, which starts
as a copy of the table that all blocks shared in distillation. The official code normalises CLIP's
students by ImageNet's statistics in training and by CLIP's in tests; here training and tests have
the statistics with which the weights were trained.

Train these recipes with ds_configs/zero1.json. Tests are in float32, except under ZeRO-3 in
bfloat16, where they are in bfloat16.
`--student.init RUN_OR_FILE` names the weights to fine-tune; without it the model starts from random
weights.
Duration and memory are computed by `plan` (docs/scaling.md), not measured.
"""

from __future__ import annotations

from typing import Any

from fd_large.recipes.architectures import overrides, resolve
from fd_large.recipes.run import UNNAMED, Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.recipes.students import DISTILLED_AT_192
from fd_large.tasks.classification.section import FineTune


def _finetune(
    model: str,
    *,
    drop_path_rate: float,
    end_lr: float = 2.5e-7,
    image_size: int = 224,
    global_batch_size: int = 2048,
    mixing: bool = True,
    window_size: int | None = None,
    checkpoint_blocks: bool = False,
    **optim: Any,
) -> Run:
    named = resolve(model)
    shape = named.with_own_position_biases()
    if window_size:
        sizes = {"window_size": window_size, "pretrained_window_sizes": DISTILLED_AT_192}
        shape = shape.overridden(sizes)
    section = FineTune() if mixing else FineTune(mixup=0.0, cutmix=0.0)
    common: dict[str, Any] = {"epochs": 100, "warmup_epochs": 20, "clip_norm": 5.0}
    return Run(
        name=UNNAMED,
        student=Student(
            model=model,
            architecture=overrides(shape, named),
            drop_path_rate=drop_path_rate,
            activation_checkpointing="every" if checkpoint_blocks else "off",
        ),
        data=Data(image_size=image_size, min_crop_scale=0.08),
        # The sections of tasks are fields that are made from the table of tasks.
        task=Task(name="finetune", finetune=section),  # type: ignore[call-arg]
        optim=Optim(**{"warmup_lr": end_lr, "min_lr": end_lr, **common, **optim}),
        batch=Batch(global_batch_size=global_batch_size),
    )


def finetune_clip_vit_base() -> Run:
    """Fine-tune the student of CLIP ViT-B/16 after 300 epochs (fd_clip_vit_base).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; 21 to 33 GPU-hours
    Memory: 12.3 GB of each GPU
    Result: ImageNet-1K 84.9 (README), 85.0 (paper); CLIP itself 82.9

    Work: 3 x 35.1 GFLOP x 1.28e8 images = 1.3e19 FLOP, and the same for the other base models.
    """
    return _finetune("vit_base_patch16", base_lr=1.25e-3, layer_decay=0.60, drop_path_rate=0.3)


def finetune_clip_vit_base_100ep() -> Run:
    """Fine-tune the student of CLIP ViT-B/16 after 100 epochs (fd_clip_vit_base_100ep).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; 21 to 33 GPU-hours
    Memory: 12.3 GB of each GPU
    Result: no figure known (300 epochs: 84.9)
    """
    return _finetune("vit_base_patch16", base_lr=1.25e-3, layer_decay=0.65, drop_path_rate=0.1)


def finetune_clip_vit_large() -> Run:
    """Fine-tune the student of CLIP ViT-L/14 (fd_clip_vit_large).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 31,250 steps; 44 to 69 GPU-hours
    Memory: 37.0 GB of each GPU
    Result: ImageNet-1K 87.7; CLIP itself 86.1

    Work: 3 x 162 GFLOP x 6.4e7 images = 3.1e19 FLOP.
    """
    return _finetune(
        "vit_large_patch14",
        base_lr=2.5e-4,
        end_lr=5e-7,
        layer_decay=0.75,
        drop_path_rate=0.4,
        epochs=50,
        warmup_epochs=5,
    )


def finetune_dino_vit_base() -> Run:
    """Fine-tune the student of DINO ViT-B/16 (fd_dino_vit_base).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; 21 to 33 GPU-hours
    Memory: 12.3 GB of each GPU
    Result: ImageNet-1K 83.8; DINO itself 82.8
    """
    return _finetune("vit_base_patch16", base_lr=1.5e-3, layer_decay=0.60, drop_path_rate=0.2)


def finetune_deit_vit_base() -> Run:
    """Fine-tune the student of DeiT ViT-B/16 (fd_deit_vit_base).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; 21 to 33 GPU-hours
    Memory: 12.3 GB of each GPU
    Result: ImageNet-1K 83.0; DeiT itself 81.8
    """
    return _finetune("vit_base_patch16", base_lr=1.25e-3, layer_decay=0.65, drop_path_rate=0.3)


def finetune_esvit_swin_base() -> Run:
    """Fine-tune the student of EsViT Swin-B (fd_esvit_swin_base).

    Hardware: 16 GPUs x 64 images; ImageNet-1K in train/ and val/
    Duration: 125,100 steps; 26 to 41 GPU-hours
    Memory: 9.4 GB of each GPU
    Result: ImageNet-1K 85.1; EsViT itself 83.9

    The global batch is 1024, with 64 images per GPU, which the authors call a mistake of theirs.
    Work: 3 x 32.6 GFLOP x 1.28e8 images = 1.3e19 FLOP.
    """
    return _finetune(
        "swinv2_base", base_lr=1.25e-3, layer_decay=0.80, drop_path_rate=0.4, global_batch_size=1024
    )


def finetune_clip_vit_large_22k() -> Run:
    """Fine-tune the student of CLIP ViT-L/14 on ImageNet-22K, on its way to ImageNet-1K.

    Hardware: 32 GPUs x 128 images; ImageNet-22K, a folder for each of its 21,841 classes
    Duration: 311,940 steps; 900 to 1,400 GPU-hours
    Memory: 36.9 GB of each GPU
    Result: no figure of its own; ImageNet-1K 88.3 after finetune_clip_vit_large_22k_1k

    The paper's settings are not published. These settings are for BEiTv2's ViT-L, which was
    distilled from CLIP, too (beit2/get_started_for_image_classification.md of microsoft/unilm): 90
    epochs, of which 20 are warm-up from 0, 6e-4 at batch 4096 with a decay to 1e-6, layer decay
    .75, drop path .2, and no clipping. The dataset has no test images; --data.val_fraction 0.002
    holds some images out.
    Work: 3 x 162 GFLOP x 14.2e6 images x 90 = 6.2e20 FLOP.
    """
    return _intermediate(
        peak=6e-4,
        global_batch_size=4096,
        layer_decay=0.75,
        drop_path_rate=0.2,
        epochs=90,
        warmup_epochs=20,
    )


def finetune_clip_vit_large_22k_1k() -> Run:
    """Fine-tune the ViT-L/14 of finetune_clip_vit_large_22k on ImageNet-1K.

    Hardware: 16 GPUs x 64 images; ImageNet-1K in train/ and val/
    Duration: 25,020 steps; 18 to 29 GPU-hours
    Memory: 20.6 GB of each GPU
    Result: ImageNet-1K 88.3

    The settings are BEiTv2's for a ViT-L after ImageNet-22K: 20 epochs, 7e-5 at batch 1024, layer
    decay .8, drop path .25, and no mixing. --student.init RUN loads the backbone; the classifier
    and the norm before it are new (BEiTv2 keeps that norm).
    Work: 3 x 162 GFLOP x 2.6e7 images = 1.2e19 FLOP.
    """
    return _after_intermediate(image_size=224)


def finetune_clip_vit_large_22k_1k_336() -> Run:
    """Fine-tune the ViT-L/14 of finetune_clip_vit_large_22k on ImageNet-1K at 336 px.

    Hardware: 32 GPUs x 32 images; ImageNet-1K in train/ and val/
    Duration: 25,020 steps; 43 to 67 GPU-hours
    Memory: 22.5 GB of each GPU
    Result: ImageNet-1K 89.0

    The settings are those of finetune_clip_vit_large_22k_1k, since BEiT changes nothing but the
    size. The tables of relative positions are resized from 16 x 16 to 24 x 24 patches, as published
    (docs/weights.md).
    Work: 3 x 382 GFLOP x 2.6e7 images = 2.9e19 FLOP.
    """
    return _after_intermediate(image_size=336)


def _intermediate(*, peak: float, global_batch_size: int, **changed: Any) -> Run:
    # BEiT states its rates for the batch that it has.
    per_512 = 512 / global_batch_size
    return _finetune(
        "vit_large_patch14",
        base_lr=peak * per_512,
        warmup_lr=0.0,
        end_lr=1e-6 * per_512,
        global_batch_size=global_batch_size,
        clip_norm=0.0,
        **changed,
    )


def _after_intermediate(*, image_size: int) -> Run:
    return _intermediate(
        peak=7e-5,
        global_batch_size=1024,
        layer_decay=0.8,
        drop_path_rate=0.25,
        epochs=20,
        warmup_epochs=5,
        image_size=image_size,
        mixing=False,
    )


def finetune_swinv2_base() -> Run:
    """Fine-tune a SwinV2-B that was distilled at 192 px (fd_swinv2_base).

    Hardware: 16 GPUs x 64 images; ImageNet-1K in train/ and val/
    Duration: 125,100 steps; 26 to 41 GPU-hours
    Memory: 9.4 GB of each GPU
    Result: not published (the paper's SwinV2-B, a student of EsViT: 85.1)

    The settings are those of the paper's SwinV2-B (finetune_esvit_swin_base). Windows have 14
    tokens instead of 12 (6 in the last stage) in distillation, as when SimMIM fine-tunes its
    SwinV2-B. SimMIM's model, of another pre-training, has layer decay .75, drop path .1 and batch
    2048.
    """
    return _finetune(
        "swinv2_base",
        base_lr=1.25e-3,
        layer_decay=0.80,
        drop_path_rate=0.4,
        global_batch_size=1024,
        window_size=14,
    )


def finetune_swinv2_large() -> Run:
    """Fine-tune a SwinV2-L that was distilled at 192 px (fd_swinv2_large).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; 46 to 71 GPU-hours
    Memory: 23.6 GB of each GPU
    Result: not published

    The settings are SimMIM's for a Swin-L (configs/simmim of microsoft/Swin-Transformer): the
    learning rates of the base models at batch 2048, layer decay .7, and drop path .2.
    Work: 3 x 72 GFLOP x 1.28e8 images = 2.8e19 FLOP.
    """
    return _finetune(
        "swinv2_large",
        base_lr=1.25e-3,
        layer_decay=0.70,
        drop_path_rate=0.2,
        window_size=14,
    )


def finetune_swinv2_giant() -> Run:
    """Fine-tune a SwinV2-G (3.0B) that was distilled at 192 px (fd_swinv2g), at 640 px.

    Hardware: 64 GPUs of 80 GB x 9 images; ImageNet-1K in train/ and val/
    Duration: 22,240 steps; 580 to 930 GPU-hours
    Memory: 18.6 GB of each GPU
    Result: ImageNet-1K 89.4 (paper); SwinV2-G itself 89.2, at a size that is not published

    The only published settings of a SwinV2-G on ImageNet-1K are those of arXiv 2111.09883 (90.17
    after training on labels of ImageNet-22K): 640 px, 10 epochs, 2.1e-5 at batch 576, and drop path
    .5. The following are not published: the window (here 40, which divides all maps but the last,
    which is one window of 20), the warm-up (here 1 epoch), layer decay (here .87, as in its
    training on ImageNet-22K), weight decay (here .05) and clipping (here 5), both as for the base
    models, and the final learning rate. The published settings are for a model that was trained on
    the labels of ImageNet-22K, unlike a distilled model. Every block is checkpointed. Run it with
    ds_configs/zero3_hpz.json (slurm/finetune_swinv2g.sh).
    Work: 4 x 9,297 GFLOP x 1.28e7 images = 4.8e20 FLOP.
    """
    return _finetune(
        "swinv2_giant",
        base_lr=2.1e-5 * 512 / 576,
        layer_decay=0.87,
        drop_path_rate=0.5,
        image_size=640,
        epochs=10,
        warmup_epochs=1,
        global_batch_size=576,
        window_size=40,
        checkpoint_blocks=True,
    )


def finetune_clip_vit_base_plain() -> Run:
    """Fine-tune CLIP ViT-B/16 itself, carefully: the baseline for its distilled students.

    Hardware: 8 GPUs x 256 images; ImageNet-1K in train/ and val/
    Duration: 31,250 steps; 14 to 21 GPU-hours
    Memory: 24.3 GB of each GPU
    Result: ImageNet-1K 85.7, tested with the average of the weights

    Source: Dong et al., "CLIP itself is a strong fine-tuner", arXiv 2212.06138, and its scripts: a
    small learning rate, no mixing, no drop path, no clipping, and an average of the weights. The
    official classifier normalises every token before the mean, while here the mean is normalised.
    The authors freeze the patch embedding at 224 px, while here it is trained at .0013 of the
    learning rate. Name the weights by --student.init FILE or open_clip:ViT-B-16/openai.
    """
    return _plain(
        "clip_vit_base_patch16", base_lr=1.5e-4, layer_decay=0.60, epochs=50, warmup_epochs=10
    )


def finetune_clip_vit_large_plain() -> Run:
    """Fine-tune CLIP ViT-L/14 itself, carefully: the baseline for its distilled students.

    Hardware: 8 GPUs x 256 images; ImageNet-1K in train/ and val/
    Duration: 18,750 steps; 33 to 51 GPU-hours
    Memory: 40.9 GB of each GPU
    Result: ImageNet-1K 88.0, tested with the average of the weights

    The source and its settings are described in finetune_clip_vit_base_plain.
    """
    return _plain(
        "clip_vit_large_patch14", base_lr=1e-4, layer_decay=0.65, epochs=30, warmup_epochs=5
    )


def _plain(model: str, **optim: Any) -> Run:
    return _finetune(
        model, drop_path_rate=0.0, clip_norm=0.0, ema_decay=0.9998, mixing=False, **optim
    )
