"""Fine-tuning on ImageNet-1K: the paper's six students, and CLIP itself, as published.

Source: the configurations of SwinTransformer/Feature-Distillation (finetune/*.yaml) and its README.

Common to all six students: 224 px; AdamW with betas .9/.999 and weight decay .05; gradients clipped
at a norm of 5.0; the learning rates that warm-up starts and the cosine ends at are equal; 100
epochs with a warm-up of 20 (50 with 5 for the large model); RandAugment m9-mstd0.5-inc1, erasing
.25, mixup .8, CutMix 1.0 (switched at .5), smoothing .1; tests on the middle crop of 256/224 of the
size, bicubic. 128 images on each of 16 GPUs (README, and finetune/*esvit*.yaml). One position table
per block, copied from the one that distillation shared. The official code normalises CLIP's
students by ImageNet's statistics in training and by CLIP's in tests; here both are those that the
weights were trained with.

Train them with ds_configs/zero1.json: under ZeRO-3 in bfloat16 the tests are in bfloat16 too, else
in float32. `--student.init RUN_OR_FILE` names what is fine-tuned; without it the model starts from
random weights. Durations are calculated, at an assumed 200 TFLOP/s per GPU.
"""

from __future__ import annotations

from dataclasses import replace

from fd_large.recipes.architectures import overrides, resolve
from fd_large.recipes.run import Run, Task
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.finetuning.section import FineTune


def _finetune(
    name: str,
    model: str,
    *,
    base_lr: float,
    end_lr: float = 2.5e-7,
    layer_decay: float,
    drop_path_rate: float,
    epochs: int = 100,
    warmup_epochs: int = 20,
    global_batch_size: int = 2048,
) -> Run:
    named = resolve(model)
    return Run(
        name=name,
        student=Student(
            model=model,
            architecture=overrides(named.with_own_position_biases(), named),
            drop_path_rate=drop_path_rate,
        ),
        data=Data(image_size=224, min_crop_scale=0.08),
        task=Task(name="finetune"),
        optim=Optim(
            base_lr=base_lr,
            warmup_lr=end_lr,
            min_lr=end_lr,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            clip_norm=5.0,
            layer_decay=layer_decay,
        ),
        batch=Batch(global_batch_size=global_batch_size),
    )


def finetune_clip_vit_base() -> Run:
    """Fine-tune the student of CLIP ViT-B/16 after 300 epochs (fd_clip_vit_base).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; about 19 GPU-hours
    Result: ImageNet-1K 84.9 (README), 85.0 (paper); CLIP itself 82.9

    Duration: 3 x 35.1 GFLOP x 1.28e8 images = 1.3e19 FLOP, and the same for the other base models.
    """
    return _finetune(
        "finetune_clip_vit_base",
        "vit_base_patch16",
        base_lr=1.25e-3,
        layer_decay=0.60,
        drop_path_rate=0.3,
    )


def finetune_clip_vit_base_100ep() -> Run:
    """Fine-tune the student of CLIP ViT-B/16 after 100 epochs (fd_clip_vit_base_100ep).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; about 19 GPU-hours
    Result: no figure known (300 epochs: 84.9)
    """
    return _finetune(
        "finetune_clip_vit_base_100ep",
        "vit_base_patch16",
        base_lr=1.25e-3,
        layer_decay=0.65,
        drop_path_rate=0.1,
    )


def finetune_clip_vit_large() -> Run:
    """Fine-tune the student of CLIP ViT-L/14 (fd_clip_vit_large).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 31,250 steps; about 43 GPU-hours
    Result: ImageNet-1K 87.7; CLIP itself 86.1

    Duration: 3 x 162 GFLOP x 6.4e7 images = 3.1e19 FLOP.
    """
    return _finetune(
        "finetune_clip_vit_large",
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
    Duration: 62,500 steps; about 19 GPU-hours
    Result: ImageNet-1K 83.8; DINO itself 82.8
    """
    return _finetune(
        "finetune_dino_vit_base",
        "vit_base_patch16",
        base_lr=1.5e-3,
        layer_decay=0.60,
        drop_path_rate=0.2,
    )


def finetune_deit_vit_base() -> Run:
    """Fine-tune the student of DeiT ViT-B/16 (fd_deit_vit_base).

    Hardware: 16 GPUs x 128 images; ImageNet-1K in train/ and val/
    Duration: 62,500 steps; about 19 GPU-hours
    Result: ImageNet-1K 83.0; DeiT itself 81.8
    """
    return _finetune(
        "finetune_deit_vit_base",
        "vit_base_patch16",
        base_lr=1.25e-3,
        layer_decay=0.65,
        drop_path_rate=0.3,
    )


def finetune_esvit_swin_base() -> Run:
    """Fine-tune the student of EsViT Swin-B (fd_esvit_swin_base).

    Hardware: 16 GPUs x 64 images; ImageNet-1K in train/ and val/
    Duration: 125,100 steps; about 17 GPU-hours
    Result: ImageNet-1K 85.1; EsViT itself 83.9

    64 images per GPU, which the authors call a mistake of theirs: a global batch of 1024.
    Duration: 3 x 32.6 GFLOP x 1.28e8 images = 1.3e19 FLOP.
    """
    return _finetune(
        "finetune_esvit_swin_base",
        "swinv2_base",
        base_lr=1.25e-3,
        layer_decay=0.80,
        drop_path_rate=0.4,
        global_batch_size=1024,
    )


def finetune_clip_vit_base_plain() -> Run:
    """Fine-tune CLIP ViT-B/16 itself, carefully: what a distilled student is held against.

    Hardware: 8 GPUs x 256 images; ImageNet-1K in train/ and val/
    Duration: 31,250 steps; about 9 GPU-hours
    Result: ImageNet-1K 85.7, tested with the average of the weights

    Source: Dong et al., "CLIP itself is a strong fine-tuner", arXiv 2212.06138, and its scripts: a
    small learning rate, no mixing, no drop path, no clipping, an average of the weights. The
    official classifier normalises every token before the mean, here the mean is normalised. Name
    the weights: --student.init FILE or open_clip:ViT-B-16/openai.
    """
    return _plain(
        "finetune_clip_vit_base_plain",
        "clip_vit_base_patch16",
        base_lr=1.5e-4,
        layer_decay=0.60,
        epochs=50,
        warmup_epochs=10,
    )


def finetune_clip_vit_large_plain() -> Run:
    """Fine-tune CLIP ViT-L/14 itself, carefully: what a distilled student is held against.

    Hardware: 8 GPUs x 256 images; ImageNet-1K in train/ and val/
    Duration: 18,750 steps; about 26 GPU-hours
    Result: ImageNet-1K 88.0, tested with the average of the weights

    Source: as finetune_clip_vit_base_plain.
    """
    return _plain(
        "finetune_clip_vit_large_plain",
        "clip_vit_large_patch14",
        base_lr=1e-4,
        layer_decay=0.65,
        epochs=30,
        warmup_epochs=5,
    )


def _plain(
    name: str, model: str, *, base_lr: float, layer_decay: float, epochs: int, warmup_epochs: int
) -> Run:
    run = _finetune(
        name,
        model,
        base_lr=base_lr,
        layer_decay=layer_decay,
        drop_path_rate=0.0,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
    )
    mixing = FineTune(mixup=0.0, cutmix=0.0)
    # The sections of tasks are fields that are made from the table of tasks.
    unmixed = Task(name="finetune", finetune=mixing)  # type: ignore[call-arg]
    return replace(run, task=unmixed, optim=replace(run.optim, clip_norm=0.0, ema_decay=0.9998))
