"""Students of several teachers: published runs, as far as they are published, and our own.

UNIC, Theia and SAK publish their training code, from which the settings are taken. Each recipe
lists the differences of this package. NVIDIA, Meta and others publish no training code of RADIO,
EUPE and AMoE. The agglomerative recipes and the proxy follow the ideas of these models, with
settings of our own.

Recipes name the weights of teachers from timm, which are downloaded at the start. Teachers of other
families need `--teachers.NAME.source`.

Duration and memory are computed by `plan` (docs/scaling.md), not measured. Work is FLOPs per
image (3 x student and heads + teachers, 2 per multiply-add) x images.
"""

from __future__ import annotations

from typing import Any

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.distillation import VIT_RATES, distillation
from fd_large.recipes.distillation_swinv2 import WINDOW_12
from fd_large.recipes.run import UNNAMED, Run
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.distillation.section import NamedTeacher, Summary, Teacher, Weighting

# A cosine of whole maps and smooth L1: Theia's and SAK's.
_COSINE_AND_L1 = {"loss": "0.9 cosine_of_map + 0.1 smooth_l1", "beta": 1.0}


def unic_vit_base() -> Run:
    """UNIC: DINO, DeiT-III, iBOT and dBOT into a ViT-B/16, 200 epochs, teachers dropped by image.

    Hardware: 4 GPUs x 128 images; weights of the four ViT-B/16
    Duration: 500,400 steps; 150 to 240 GPU-hours
    Memory: 21.7 GB of each GPU
    Result: ImageNet-1K classification 83.8, ADE20K linear 39.6 (its README)

    Source: Sariyildiz et al., arXiv 2408.05088, and its code (naver/unic, main_unic.py): AdamW with
    betas .9 / .99, weight decay .03, 3e-4 per 256 images, a cosine to 1e-6 after 10 epochs of
    warm-up, no clipping, drop path .1; a ladder of projectors for class token and patches, whose
    targets are normalised by separate running statistics; half cosine and half smooth L1 with beta
    1; for each image, every teacher but the one with the largest loss is dropped with probability
    one half.
    Differences here: colours always change, not with the published probability of .8, and images
    are not blurred or solarised. Computation is in bfloat16 instead of float16. Class token and
    positions are not decayed. DeiT-III is timm's, whose map has no class token.
    Work: 330 GFLOP x 2.56e8 images = 8.5e19 FLOP.
    """
    learnt: dict[str, Any] = {
        "head": "ladder",
        "loss": "cls_and_patches",
        "beta": 1.0,
        "normaliser": "running",
    }
    names = ("dino", "ibot", "dbot")
    plain = {name: NamedTeacher(model="dino_vit_base_patch16", **learnt) for name in names}
    deit = _timm("deit3_base_patch16_224.fb_in1k", **learnt)
    return Run(
        name=UNNAMED,
        student=Student(model="dino_vit_base_patch16", drop_path_rate=0.1),
        teachers={**plain, "deit3": deit},
        weighting=Weighting(rule="drop", drop_probability=0.5),
        data=Data(color_jitter=0.4, grayscale_probability=0.2),
        # Rates are per 512 images: 6e-4 at the peak, and 1e-6 at the end.
        optim=Optim(
            base_lr=6e-4,
            warmup_lr=0.0,
            min_lr=1e-6,
            weight_decay=0.03,
            betas=(0.9, 0.99),
            clip_norm=0.0,
            epochs=200,
            warmup_epochs=10,
        ),
        batch=Batch(global_batch_size=512),
    )


def theia_vit_base() -> Run:
    """Theia: ViT-H, DINOv2-L and CLIP-L into a DeiT-B/16 by convolutions, 50 epochs.

    Hardware: 8 GPUs x 16 images; weights of CLIP ViT-L/14
    Duration: 500,450 steps; 80 to 130 GPU-hours
    Memory: 7.0 GB of each GPU
    Result: published for robots (CortexBench), not for ImageNet

    Source: Shang et al., arXiv 2407.20179, and its code (bdaiinstitute/theia, frame_level.yaml,
    cdiv.yaml, lconv.yaml): AdamW, 2e-3 per 512 images, constant after a warm-up of a tenth of the
    run, weight decay .01, no clipping; .9 of the cosine loss of whole maps and .1 of smooth L1,
    with a weight of one third for each teacher; standardised channels.
    Differences here: channels are standardised by running statistics, while Theia reads statistics
    from files (`fd-large statistics` writes such files, for the normaliser standardise). Teachers
    run with the student, while Theia reads features from disk. Images may be flipped. Theia's
    default uses a tenth of ImageNet-1K.
    Work: 836 GFLOP x 6.4e7 images = 5.4e19 FLOP.
    """
    learnt: dict[str, Any] = {
        **_COSINE_AND_L1,
        "head": "convolutional",
        "normaliser": "running",
        "teacher_image_size": 0,
        "weight": 1 / 3,
    }
    return Run(
        name=UNNAMED,
        student=Student(model="deit_vit_base_patch16"),
        teachers={
            "vit": _timm("vit_huge_patch14_224.orig_in21k", **learnt),
            "dino": _timm("vit_large_patch14_dinov2.lvd142m", image_size=224, **learnt),
            "clip": NamedTeacher(model="clip_vit_large_patch14", **learnt),
        },
        data=Data(min_crop_scale=1.0),
        optim=Optim(
            base_lr=2e-3,
            warmup_lr=2e-5,
            min_lr=2e-3,
            weight_decay=0.01,
            clip_norm=0.0,
            epochs=50,
            warmup_epochs=5,
        ),
        batch=Batch(global_batch_size=128),
    )


def sak_vit_base() -> Run:
    """SAK's first stage: DINOv2-B, CLIP-B and SAM-B into a ViT-B/16 at 384 px, 30 epochs.

    Hardware: 8 GPUs x 16 images; weights of CLIP ViT-B/16
    Duration: 300,270 steps; 150 to 240 GPU-hours
    Memory: 17.5 GB of each GPU
    Result: published after its second stage, on Pascal-Context and NYUv2

    Source: Lu et al., arXiv 2410.14633, and its code (innovator-zero/SAK, BB_s1.yml): AdamW, 1e-3,
    weight decay .01, a cosine to 1e-5 after two epochs of warm-up, no clipping; .9 of the cosine
    loss of whole maps and .1 of smooth L1, on targets that are not normalised, summed over
    teachers; the map with fewer tokens is resized to the other map. The number of GPUs is not
    published.
    Differences here: the student learns the last map of each teacher, while SAK learns four levels.
    The student has no adapters for each teacher. Crops have at least .08 of an image.
    Work: 1,537 GFLOP (SAM alone 970) x 3.84e7 images = 5.9e19 FLOP.
    """
    learnt: dict[str, Any] = {
        **_COSINE_AND_L1,
        "normaliser": "none",
        "interpolation": "bilinear_larger",
    }
    return Run(
        name=UNNAMED,
        student=Student(model="deit_vit_base_patch16"),
        teachers={
            "dino": _timm("vit_base_patch14_dinov2.lvd142m", image_size=336, **learnt),
            "clip": NamedTeacher(model="clip_vit_base_patch16", **learnt),
            "sam": _timm("samvit_base_patch16.sa1b", **learnt),
        },
        data=Data(image_size=384),
        # At 512 images, for 1e-3 and 1e-5 at 128.
        optim=Optim(
            base_lr=4e-3,
            warmup_lr=5e-7,
            min_lr=4e-5,
            weight_decay=0.01,
            clip_norm=0.0,
            epochs=30,
            warmup_epochs=2,
        ),
        batch=Batch(global_batch_size=128),
    )


def agglomerative_vit_large() -> Run:
    """CLIP-L, DINOv2-g and SAM-L into a ViT-L/14: our own choices, after RADIO.

    Hardware: 16 GPUs x 128 images; weights of CLIP ViT-L/14
    Duration: 187,500 steps; 3,300 to 5,200 GPU-hours
    Memory: 45.7 GB of each GPU
    Result: not trained yet

    The student's settings are those of FD's ViT-L (fd_clip_vit_large). For each teacher, a head of
    two layers learns the whitened map. For CLIP and DINOv2, another head learns the summary by the
    cosine loss. This is RADIO's objective before PHI-S (arXiv 2312.06709). SAM
    teaches its map alone.
    Work: (3 x 162 + 162 + 590 + 2,988 of SAM) GFLOP x 3.84e8 images = 1.6e21 FLOP.
    """
    return _agglomerative(
        Student(model="vit_large_patch14", drop_path_rate=0.3),
        {
            "clip": NamedTeacher(model="clip_vit_large_patch14", **_AGGLOMERATIVE),
            "dino": _timm("vit_giant_patch14_reg4_dinov2.lvd142m", **_AGGLOMERATIVE),
            "sam": _timm("samvit_large_patch16.sa1b", head="mlp"),
        },
        image_size=224,
    )


def agglomerative_swinv2_giant() -> Run:
    """The teachers of agglomerative_vit_large into SwinV2-G, three billion parameters.

    Hardware: 64 GPUs of 80 GB x 32 images; weights of CLIP ViT-L/14
    Duration: 187,500 steps; 4,600 to 7,400 GPU-hours
    Memory: 47.8 GB of each GPU
    Result: not trained yet

    The student's settings are those of fd_swinv2g, with ds_configs/zero3_hpz.json. Its map at 192
    px has 6 x 6 tokens, and the teachers' maps are resized to this grid.
    Work: (4 x 743 + 162 + 393 + 2,988) GFLOP x 3.84e8 images = 2.5e21 FLOP.
    """
    return _agglomerative(
        Student(
            model="swinv2_giant",
            architecture=WINDOW_12,
            drop_path_rate=0.3,
            residual_dtype="float32",
            activation_checkpointing="every",
        ),
        dict(agglomerative_vit_large().teachers),
        image_size=192,
        rates=(7.5e-5, 3.75e-7, 3.75e-6),
    )


def proxy_vit_giant() -> Run:
    """Two Perception Encoders and DINOv3-H+ into a ViT-g/14 of 1.1 billion: first of two commands.

    Hardware: 64 GPUs of 80 GB x 32 images; the weights are downloaded
    Duration: 187,500 steps; 2,800 to 4,400 GPU-hours
    Memory: 21.5 GB of each GPU
    Result: not trained yet

    The idea is EUPE's (arXiv 2603.22387): several large teachers are distilled into one proxy, and
    the proxy into small students, which learn more from the proxy than from the teachers. EUPE's
    code is not published; the teachers are EUPE's, and the settings are our own.

    Work: (4 x 600 + 2 x 1,000 + 438) GFLOP x 3.84e8 images = 1.9e21 FLOP.

        train --recipe proxy_vit_giant --runtime.run_dir runs/proxy
        train --recipe proxy_vit_base --teacher.source runs/proxy
    """
    return _agglomerative(
        Student(
            model="vit_large_patch14",
            architecture=_GIANT,
            drop_path_rate=0.4,
            activation_checkpointing="every",
        ),
        {
            "core": _timm("vit_pe_core_gigantic_patch14_448.fb", **_AGGLOMERATIVE),
            "language": _timm("vit_pe_lang_gigantic_patch14_448.fb", **_AGGLOMERATIVE),
            "dino": _timm("vit_huge_plus_patch16_dinov3.lvd1689m", **_AGGLOMERATIVE),
        },
        image_size=224,
    )


def proxy_vit_base() -> Run:
    """The proxy of proxy_vit_giant into a ViT-B/16, 300 epochs: second of two commands.

    Hardware: 16 GPUs x 128 images; the run folder of proxy_vit_giant
    Duration: 187,500 steps; 280 to 430 GPU-hours
    Memory: 15.2 GB of each GPU
    Result: not trained yet

    The proxy is the only teacher, by the objective of the FD paper. It sees images of 196 px, so
    that its grid of patches of 14 pixels equals the student's grid.
    """
    return distillation(
        Student(model="vit_base_patch16", drop_path_rate=0.2),
        Teacher(model="vit_large_patch14", architecture=_GIANT),
        rates=VIT_RATES,
    )


# ViT-g: 40 x 12 x 1536^2 = 1.13e9 parameters in its blocks.
_GIANT = Architecture(embed_dim=1536, depths=(40,), num_heads=(24,))
_AGGLOMERATIVE: dict[str, Any] = {
    "targets": ("map", "summary"),
    "head": "mlp",
    "summary": Summary(loss="cosine", normaliser="none"),
}


def _timm(name: str, *, image_size: int | None = None, **fields: Any) -> NamedTeacher:
    """Returns a teacher of timm with its pretrained weights.

    Args:
        name: Name of the weights in timm, MODEL.TAG.
        image_size: Side in pixels for which the model is made; None for the model's own.
        **fields: Further fields of the teacher.
    """
    model = f"timm:{name.partition('.')[0]}"
    architecture = Architecture() if image_size is None else Architecture(image_size=image_size)
    return NamedTeacher(model=model, architecture=architecture, source=f"timm:{name}", **fields)


def _agglomerative(
    student: Student,
    teachers: dict[str, NamedTeacher],
    *,
    image_size: int,
    rates: tuple[float, float, float] = VIT_RATES,
) -> Run:
    """Returns a distillation of several teachers, with the settings that our recipes share.

    The rates are as in `Rates` of distillation.py.
    """
    base_lr, warmup_lr, min_lr = rates
    return Run(
        name=UNNAMED,
        student=student,
        teachers=teachers,
        data=Data(image_size=image_size),
        optim=Optim(base_lr=base_lr, warmup_lr=warmup_lr, min_lr=min_lr, epochs=300),
        batch=Batch(global_batch_size=2048),
    )
