"""SwinV2 into SwinV2, up to three billion parameters: our own choices.

The paper reports SwinV2-G (ImageNet-1K 89.2 -> 89.4, ADE20K 59.9 -> 61.4, COCO test-dev 64.2 box)
and publishes no recipe for it: neither data, epochs, rates, resolution, window, drop path, batch
nor hardware. What stands here is chosen, and the reason is given at each number.

Common choices, with reasons:

- 192 px, window 12, grid 6 x 6: how the public SwinV2 models were pre-trained, so the teacher sees
  what it was trained on, and a step costs 0.73 of one at 224 px (743 against 1016 GFLOP in G).
- ImageNet-1K, 300 epochs, global batch 2048 (187,500 steps), crops from .08, drop path .3, clip
  3.0, decay .05: the paper's EsViT run into SwinV2-B, its only published Swin student.
- Rates of that run (2e-4 / 1e-6 / 1e-5 per 512 images) for B and L, as the paper keeps one rate for
  ViT-B and ViT-L. Above that the peak falls and the ends keep their ratio to it (1/200 and 1/20):
  1b and huge take half; giant 7.5e-5, since the SwinV2 paper pre-trained G at 1.4e-3 with a batch
  of 9216, which is 1.4e-3 x 512 / 9216 = 7.8e-5 per 512 images.
- FD's initialisation (branch norms start at 1e-5), as in the paper's Swin student.
- A float32 residual stream: a branch of size 1e-5 added to a bfloat16 stream of size 1 is rounded
  away until the norm weight has grown past half a step, 2^-9 = 2e-3.
- bfloat16 teachers: a target is whitened in float32 afterwards, and the bytes halve.

Memory a GPU, between steps: 18 bytes a student parameter over the ranks (bfloat16 weight; float32
accumulated gradient, master and two moments) + 2 bytes a teacher parameter. For backward, a
checkpointed model keeps each block's input (4 bytes in float32, the table's "kept") and one live
block.

| model   | parameters | student states | teacher | kept an image | one block | without checkpoints |
|-------|------------|----------------|---------|---------------|-----------|---------------------|
| huge  | 0.655e9    | 11.8 GB        | 1.3 GB  | 25 MB         | 64 MB     | 496 MB              |
| 1b    | 1.061e9    | 19.1 GB        | 2.1 GB  | 32 MB         | 81 MB     | 631 MB              |
| giant | 2.998e9    | 54.0 GB        | 6.0 GB  | 66 MB         | 93 MB     | 1303 MB             |

("One block" and "without" are counted for giant with unfused attention and a bfloat16 stream;
huge and 1b are scaled by width and by the stages' sum of depth x tokens x width.)

Durations are arithmetic, not measurements: FLOPs an image x 3.84e8 images at an assumed 200 TFLOP/s
a GPU; 3 x student + teacher, and one more student forward with checkpoints.
"""

from __future__ import annotations

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Batch, Data, Optim, Student
from fd_large.tasks.distillation.section import Teacher

# 1b, huge and giant have window 12 as their own; base and large are named with 14, for 224 px.
WINDOW_12 = Architecture(window_size=12)
DATA_192 = Data(image_size=192, min_crop_scale=0.08)


def _optim(base_lr: float, warmup_lr: float, min_lr: float) -> Optim:
    return Optim(base_lr=base_lr, warmup_lr=warmup_lr, min_lr=min_lr, epochs=300, warmup_epochs=10)


def fd_swinv2_base() -> Run:
    """SwinV2-B (ImageNet-22K classifier) into a SwinV2-B, 300 epochs.

    Hardware: 16 GPUs x 128 images; SwinV2-B 192/w12 22K weights
    Duration: 187,500 steps; about 50 GPU-hours
    Result: not published

    The teacher is supervised: the paper finds gains for those (DeiT-B 81.8 -> 83.0) and hardly any
    for masked image models (MAE-B 83.6 -> 83.8).
    Duration: 4 x 23.5 GFLOP x 3.84e8 = 3.6e19 FLOP. Memory: 18 x 0.087e9 = 1.6 GB of states over
    the ranks, 0.2 GB of teacher on each.
    """
    return Run(
        name="fd_swinv2_base",
        student=Student(model="swinv2_base", architecture=WINDOW_12, drop_path_rate=0.3),
        teacher=Teacher(model="swinv2_base", architecture=WINDOW_12),
        data=DATA_192,
        optim=_optim(2e-4, 1e-6, 1e-5),
        batch=Batch(global_batch_size=2048),
    )


def fd_swinv2_large() -> Run:
    """SwinV2-L (ImageNet-22K classifier) into a SwinV2-L, 300 epochs.

    Hardware: 16 GPUs x 128 images; SwinV2-L 192/w12 22K weights
    Duration: 187,500 steps; about 111 GPU-hours
    Result: not published

    Duration: 4 x 51.9 GFLOP x 3.84e8 = 8.0e19 FLOP. Memory: 18 x 0.195e9 = 3.5 GB of states over
    the ranks, 0.4 GB of teacher on each.
    """
    return Run(
        name="fd_swinv2_large",
        student=Student(model="swinv2_large", architecture=WINDOW_12, drop_path_rate=0.3),
        teacher=Teacher(model="swinv2_large", architecture=WINDOW_12),
        data=DATA_192,
        optim=_optim(2e-4, 1e-6, 1e-5),
        batch=Batch(global_batch_size=2048),
    )


def fd_swinv2_1b() -> Run:
    """The 1.06B SwinV2 (width 448) into itself: the largest Swin teacher with public weights.

    Hardware: 16 GPUs of 80 GB x 128 images; 1.06B SimMIM weights
    Duration: 187,500 steps; about 740 GPU-hours
    Result: not published; expect little (masked teacher)

    The model hub calls this model SwinV2-giant; it is not the 3B SwinV2-G. Its weights come from
    masked image modelling (SimMIM), where the paper saw little gain (MAE-B 83.6 -> 83.8): the run
    is there to exercise a public teacher of that size.
    Memory on 16 GPUs: 19.1 / 16 = 1.2 GB of states, 2.1 GB of teacher, replicated because that is
    small and costs no network. 128 images without checkpoints: 128 x 631 MB = 81 GB, too much for
    80 GB; with: 128 x (32 + 81) MB = 14.5 GB. Hence checkpointing, at a quarter more time:
    5 x 276 GFLOP x 3.84e8 = 5.3e20 FLOP.
    """
    return Run(
        name="fd_swinv2_1b",
        student=Student(
            model="swinv2_1b",
            drop_path_rate=0.3,
            activation_checkpointing="every",
        ),
        teacher=Teacher(model="swinv2_1b"),
        data=DATA_192,
        optim=_optim(1e-4, 5e-7, 5e-6),
        batch=Batch(global_batch_size=2048),
    )


def fd_swinv2h() -> Run:
    """SwinV2-H (0.66B, a norm on the main branch every 6 blocks) into itself, 300 epochs.

    Hardware: 16 GPUs of 40 GB x 128 images; SwinV2-H weights
    Duration: 187,500 steps; about 460 GPU-hours
    Result: not published

    The public SwinV2-H weights are SimMIM's, of a class without the extra norms: load them with
    `--teacher.architecture.extra_norm_every 0`. The student keeps the norms of the SwinV2 paper.
    Memory on 16 GPUs: 11.8 / 16 = 0.7 GB of states, 1.3 GB of teacher, replicated. 128 images
    without checkpoints: 128 x 496 MB = 63 GB; with: 128 x (25 + 64) MB = 11.4 GB, which a 40 GB GPU
    holds. Duration: 5 x 171 GFLOP x 3.84e8 = 3.3e20 FLOP.
    """
    return Run(
        name="fd_swinv2h",
        student=Student(
            model="swinv2_huge",
            drop_path_rate=0.3,
            activation_checkpointing="every",
        ),
        teacher=Teacher(model="swinv2_huge"),
        data=DATA_192,
        optim=_optim(1e-4, 5e-7, 5e-6),
        batch=Batch(global_batch_size=2048),
    )


def fd_swinv2g() -> Run:
    """SwinV2-G (3.0B, width 512, depths 2-2-42-4) into itself, 300 epochs.

    Hardware: 64 GPUs of 40 GB (8 nodes) x 32 images; SwinV2-G weights, not public
    Duration: 187,500 steps; about 1,980 GPU-hours, 31 h on 64
    Result: not published (paper's G, unknown recipe: 89.2 -> 89.4)

    Run it with ds_configs/zero3_hpz.json. No weights of SwinV2-G are public. A run that public
    weights allow takes the 1.06B model as teacher:

        --teacher.model swinv2_1b --teacher.source PATH

    Its width, 8 x 448 = 3584, is reached by the projection (4096 -> 3584); both grids are 6 x 6 at
    192 px, and where an override makes them differ, `--objective.interpolation bilinear` resizes
    the teacher's map.
    It costs 3 x 741 + 276 + 741 = 3.2 instead of 3.7 TFLOP an image, 1,730 GPU-hours.

    Duration: 5 x 741 GFLOP x 3.84e8 images = 1.42e21 FLOP (one forward of teacher, four forwards'
    worth of student with recomputation).

    Memory on 64 GPUs in nodes of 8: student states 54.0 / 64 = 0.84 GB; teacher inside the node
    6.0 / 8 = 0.75; hpZ's second copy of the weights inside the node 6.0 / 8 = 0.75; gathered layers
    about 2 GB each for student and teacher; activations of 32 images, checkpointed,
    32 x (66 + 93) MB = 5.1 GB (unfused). About 12 GB; without checkpoints 32 x 1303 MB = 41.7 GB,
    about 48 GB in all, which needs 80 GB GPUs and saves a fifth of the time
    (`--student.activation_checkpointing off`).

    Network: one gather or scatter of the model is S = 2.998e9 x 2 = 6.0 GB; a node's cards carry
    S (N-1)/N of it, at 8 nodes of 8 x 100 Gb/s (100 GB/s) 52 ms. ZeRO-3 of both models over all ranks
    makes four passes a micro-step (student forward, backward, gradients, teacher): 210 ms. A
    teacher split inside the node makes three, hpZ (backward gathers inside the node) two: 105 ms.
    Computing 32 images takes 136 ms (170 with checkpoints) at the limits of an H100 with fused
    kernels, 343 (425) without, so the network hides behind either; 8 fused ones would take 34 and
    wait. Hence placement node, hpZ, and 32 images a GPU
    as a number rather than `auto`: 2048 = 64 x 32. On 256 GPUs raise the batch to 8192, not the
    number of GPUs alone. Recomputed forwards gather again inside the node under hpZ, at no cost to
    the network. One 100 Gb/s card a node (12.5 GB/s) makes it 839 ms: use fewer, larger nodes.
    """
    return Run(
        name="fd_swinv2g",
        student=Student(
            model="swinv2_giant",
            drop_path_rate=0.3,
            activation_checkpointing="every",
        ),
        teacher=Teacher(model="swinv2_giant", placement="node"),
        data=DATA_192,
        optim=_optim(7.5e-5, 3.75e-7, 3.75e-6),
        batch=Batch(global_batch_size=2048, micro_batch_size=32),
    )
