"""SwinV2 into SwinV2, up to three billion parameters: our own choices.

The paper reports SwinV2-G (ImageNet-1K 89.2 -> 89.4, ADE20K 59.9 -> 61.4, COCO test-dev 64.2 box)
and publishes no recipe for it: neither data, epochs, learning rates, resolution, window, drop path,
batch nor hardware. The settings here are our choices, with these reasons.

Common choices:

- 192 px, window 12, grid 6 x 6: the public SwinV2 models were pre-trained in this way, so that the
  teacher sees images as in its training, and a step costs 0.73 of a step at 224 px (743 instead of
  1016 GFLOP in G).
- ImageNet-1K, 300 epochs, global batch 2048 (187,500 steps), crops from .08, drop path .3, clip
  3.0, weight decay .05: the paper's EsViT run into SwinV2-B, its only published Swin student.
- Learning rates of that run (2e-4 / 1e-6 / 1e-5 per 512 images) for B and L, since the paper has
  equal rates for ViT-B and ViT-L. Larger models have a lower peak, and the ends keep their ratio to
  the peak (1/200 and 1/20): 1b and huge have half of it, and giant has 7.5e-5, since the SwinV2
  paper pre-trained G at 1.4e-3 with a batch of 9216, which is 1.4e-3 x 512 / 9216 = 7.8e-5 per 512
  images.
- FD's initialisation (branch norms start at 1e-5), as in the paper's Swin student.
- A float32 residual stream: a branch of size 1e-5 added to a bfloat16 stream of size 1 is rounded
  away until the norm weight has grown past half a step, 2^-9 = 2e-3.
- bfloat16 teachers: the targets are whitened in float32 afterwards, and the weights take half of
  the bytes.

Between steps, the ranks hold 18 bytes per student parameter (bfloat16 weight; float32 accumulated
gradient, master weight and two moments), and a rank holds 2 bytes per teacher parameter. ZeRO-3
shards all 18 bytes of the student over the ranks, and ZeRO-1 only master weights and moments.
For the backward pass, a checkpointed model stores the input of each block and the activations of
one block. These are the bytes per image, as `plan` counts them with fused kernels:

| model | parameters | student states | teacher | activations, checkpointed | not checkpointed |
|-------|------------|----------------|---------|---------------------------|------------------|
| huge  | 0.655e9    | 11.8 GB        | 1.3 GB  | 51 MB                     | 214 MB           |
| 1b    | 1.061e9    | 19.1 GB        | 2.1 GB  | 64 MB                     | 269 MB           |
| giant | 2.998e9    | 54.0 GB        | 6.0 GB  | 116 MB                    | 553 MB           |

Plain torch kernels store only an eighth more without checkpoints, since on GPUs attention maps are
recomputed in the backward pass in any case. The three large recipes checkpoint every block,
although 40 GB (huge, giant) or 80 GB (1b) would hold their activations. This is the cautious
setting, as long as no GPU has confirmed these numbers. `--student.activation_checkpointing off`
saves a fifth of the time.

Duration and memory are computed by `plan` (docs/scaling.md), not measured; with plain torch
kernels, `plan` gives two to two and a half times the duration. Work is FLOPs per image x 3.84e8
images, where an image takes 3 x student + teacher, and with checkpoints another forward of the
student.
"""

from __future__ import annotations

from typing import Literal

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.distillation import SWIN_RATES, Rates, distillation
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Batch, Student
from fd_large.tasks.distillation.section import Teacher

# 1b, huge and giant have window 12 as their own; base and large are named with 14, for 224 px.
WINDOW_12 = Architecture(window_size=12)


def _into_itself(
    model: str,
    *,
    rates: Rates = SWIN_RATES,
    architecture: Architecture = Architecture(),  # noqa: B008 (frozen)
    checkpoint_blocks: bool = False,
    teacher_placement: Literal["replicated", "sharded", "node"] = "replicated",
    micro_batch_size: int | Literal["auto"] = "auto",
) -> Run:
    return distillation(
        Student(
            model=model,
            architecture=architecture,
            drop_path_rate=0.3,
            activation_checkpointing="every" if checkpoint_blocks else "off",
        ),
        Teacher(model=model, architecture=architecture, placement=teacher_placement),
        rates=rates,
        image_size=192,
        batch=Batch(global_batch_size=2048, micro_batch_size=micro_batch_size),
    )


def fd_swinv2_base() -> Run:
    """SwinV2-B (ImageNet-22K classifier) into a SwinV2-B, 300 epochs.

    Hardware: 16 GPUs x 128 images; SwinV2-B 192/w12 22K weights
    Duration: 187,500 steps; 73 to 110 GPU-hours
    Memory: 12.8 GB of each GPU
    Result: not published

    The teacher is supervised. The paper finds gains for supervised teachers (DeiT-B 81.8 -> 83.0)
    and hardly any for masked image models (MAE-B 83.6 -> 83.8).
    Work: 4 x 23.5 GFLOP x 3.84e8 = 3.6e19 FLOP.
    """
    return _into_itself("swinv2_base", architecture=WINDOW_12)


def fd_swinv2_large() -> Run:
    """SwinV2-L (ImageNet-22K classifier) into a SwinV2-L, 300 epochs.

    Hardware: 16 GPUs x 128 images; SwinV2-L 192/w12 22K weights
    Duration: 187,500 steps; 130 to 210 GPU-hours
    Memory: 18.6 GB of each GPU
    Result: not published

    Work: 4 x 51.9 GFLOP x 3.84e8 = 8.0e19 FLOP.
    """
    return _into_itself("swinv2_large", architecture=WINDOW_12)


def fd_swinv2_1b() -> Run:
    """The 1.06B SwinV2 (width 448) into itself: the largest Swin teacher with public weights.

    Hardware: 16 GPUs of 80 GB x 128 images; 1.06B SimMIM weights
    Duration: 187,500 steps; 690 to 1,100 GPU-hours
    Memory: 19.8 GB of each GPU
    Result: not published; expect little (masked teacher)

    The model hub calls this model SwinV2-giant, but it is not the 3B SwinV2-G. Its weights come
    from masked image modelling (SimMIM), for which the paper saw little gain (MAE-B 83.6 -> 83.8).
    The purpose of the run is to try a public teacher of this size. The teacher's 2.1 GB are
    replicated, since they are small and then need no communication.
    Work: 5 x 276 GFLOP x 3.84e8 = 5.3e20 FLOP.
    """
    return _into_itself("swinv2_1b", rates=(1e-4, 5e-7, 5e-6), checkpoint_blocks=True)


def fd_swinv2h() -> Run:
    """SwinV2-H (0.66B, a norm on the main branch every 6 blocks) into itself, 300 epochs.

    Hardware: 16 GPUs of 40 GB x 128 images; SwinV2-H weights
    Duration: 187,500 steps; 490 to 770 GPU-hours
    Memory: 14.4 GB of each GPU
    Result: not published

    The public SwinV2-H weights are SimMIM's, whose model has no extra norms: load them with
    `--teacher.architecture.extra_norm_every 0`. The student keeps the norms of the SwinV2 paper.
    Work: 5 x 171 GFLOP x 3.84e8 = 3.3e20 FLOP.
    """
    return _into_itself("swinv2_huge", rates=(1e-4, 5e-7, 5e-6), checkpoint_blocks=True)


def fd_swinv2g() -> Run:
    """SwinV2-G (3.0B, width 512, depths 2-2-42-4) into itself, 300 epochs.

    Hardware: 64 GPUs of 40 GB (8 nodes) x 32 images; SwinV2-G weights, not public
    Duration: 187,500 steps; 2,100 to 3,600 GPU-hours, 33 to 57 h on 64
    Memory: 10.7 GB of each GPU
    Result: not published (paper's G, unknown recipe: 89.2 -> 89.4)

    Hardware, duration and memory above are for these settings with ds_configs/zero3_hpz.json on
    A100s of 40 GB. slurm/fd_swinv2g.sh overrides them: ZeRO-2 without checkpoints takes 26 to 41 h
    on the same 64 GPUs, and 12 to 19 h on H100s (docs/scaling.md).

    No weights of SwinV2-G are public. With public weights, the 1.06B model can be the teacher:

        --teacher.model swinv2_1b --teacher.source PATH

    The projection (4096 -> 3584) maps to this teacher's width, 8 x 448 = 3584. Both grids are 6 x 6
    at 192 px. If a changed field makes the grids differ, the teacher's image or map is resized
    (docs/weights.md). The run then costs 4 x 744 + 276 = 3.3 instead of 3.7 TFLOP per image, and
    1,900 to 3,200 GPU-hours.

    Work: (4 x 744 + 741) GFLOP x 3.84e8 images = 1.43e21 FLOP (four times a forward of the student
    with its projection, including recomputation, and one forward of the teacher).

    These are memory and time on 64 GPUs in nodes of 8, as `python -m fd_large plan --recipe
    fd_swinv2g --gpus 64 --gpu a100_40 --network 100` computes them (in GB of a GPU, with 32 images
    per GPU, ZeRO-3 with hpZ and fused kernels):

    | teacher    | checkpoints | states | teacher | activations | buffers | all  | GPU-hours      |
    |------------|-------------|--------|---------|-------------|---------|------|----------------|
    | node       | every block | 1.6    | 0.8     | 3.9         | 4.4     | 10.7 | 2,100 to 3,600 |
    | node       | none        | 1.6    | 0.8     | 17.8        | 4.4     | 24.6 | 1,800 to 3,100 |
    | replicated | none        | 1.6    | 6.0     | 17.8        | 4.4     | 29.8 | 1,700 to 2,900 |

    The first line is this recipe; DeepSpeed's hooks take 0.1 of the 0.8 s of a step
    (docs/scaling.md). The last line is a fifth faster, and fits into 40 GB as well:
    `--teacher.placement replicated --student.activation_checkpointing off`. With the same flags and
    zero2.json, which `plan` prefers and slurm/fd_swinv2g.sh uses, it is 33.2 GB and 1,700 to 2,600
    GPU-hours. The recipe does not have these settings as long as no GPU has confirmed the numbers:
    with plain torch kernels the GPU-hours double (4,800 to 7,800 in the first line), and the lines
    without checkpoints take 2.2 GB more. "States" include hpZ's second copy of the weights, which
    is sharded over the ranks of a node, so that the backward pass gathers inside the node.

    On larger cards with a faster network, `plan` chooses other settings:

        python -m fd_large plan --recipe fd_swinv2g --gpus 64 --gpu h100 --network 400

    It chooses ZeRO-2, the whole teacher on each rank, and no checkpoints: 33.2 GB, 790 to 1,200
    GPU-hours. This recipe's own settings take 10.7 GB of H100s there and 1,200 to 2,100 GPU-hours.

    Network: one all-gather or reduce-scatter of the model moves S = 2.998e9 x 2 = 6.0 GB. The
    network cards of a node carry S (N-1)/N of it with N nodes. With 8 nodes of 8 x 100 Gb/s (100
    GB/s, of which `plan` expects 80) this takes 66 ms. ZeRO-3 of both models over all ranks needs
    four such collectives per micro-batch (student forward, backward, gradients, teacher). A teacher
    that is sharded inside the node leaves three, and hpZ two, because the backward pass, with
    recomputed forward passes, gathers inside the node. Including communication inside the node,
    `plan` counts 193 ms of communication, and 733 ms of computation on A100s or 367 ms on H100s, so
    that computation hides the network. Therefore the placement is node, hpZ is on, and the images
    per GPU are set to 32 instead of `auto`: 2048 = 64 x 32. On 256 GPUs, raise the batch to 8192,
    too. With one 100 Gb/s card per node, the network takes 1.1 s: use fewer, larger nodes.
    """
    return _into_itself(
        "swinv2_giant",
        rates=(7.5e-5, 3.75e-7, 3.75e-6),
        checkpoint_blocks=True,
        teacher_placement="node",
        micro_batch_size=32,
    )
