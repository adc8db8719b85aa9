"""Bytes of a model beside its matrix products: moved in a step, and stored for the backward pass.

A block of width C with T tokens, h heads and attention maps of N x N moves and stores a number of
bytes per T C, per T h and per T N h. The tables below hold these numbers, which follow from the
operations: a norm of a bfloat16 branch onto a float32 stream reads 4 + 2 and writes 4 bytes, and so
on. They are the counts of benchmarks/roofline.py, with which a test compares them.

Rules of the count: each operation reads every distinct input once and writes every new output once;
views are free; there is no cache. What a step moves once, whatever its batch (position tables,
partial sums of gradients), is left out: 2% of SwinV2-G's bytes at 32 images.

"fused" takes one pass each for residual and norm, and for everything between the qkv and the output
projection; "reference" is plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.plan.parameters import POSITION_BIAS_WIDTH
from fd_large.plan.rates import CLASSES
from fd_large.recipes.family import FamilyArchitecture, Transformer

Kernels = Literal["fused", "reference"]
Phase = Literal["forward", "backward", "inference"]


class Per(NamedTuple):
    """Bytes of a block.

    Attributes:
        channels: Bytes per token and channel.
        heads: Bytes per token and head.
        maps: Bytes per entry of an N x N attention map.
        shifted_channels: Additional bytes per token and channel if windows are shifted.
        shifted_maps: Additional bytes per entry if windows are shifted.
    """

    channels: float
    heads: float = 0.0
    maps: float = 0.0
    shifted_channels: float = 0.0
    shifted_maps: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Bytes of a kind of block in a data type.

    Attributes:
        stream: Norms, residuals, casts, window copies and the gradients of biases, by phase, with a
            float32 residual stream.
        narrow: Bytes per token and channel that a narrow residual stream saves of these, by phase.
        attention: Between the projections of attention, by phase.
        kept: Stored for the backward pass, without attention maps.
        kept_maps: Additional bytes if attention maps are stored as well.
    """

    stream: dict[Phase, Per]
    narrow: dict[Phase, float]
    attention: dict[Phase, Per]
    kept: Per
    kept_maps: Per


def _counts(
    stream: tuple[float, float, float],
    narrow: tuple[float, float, float],
    attention: tuple[Per, Per, Per],
    *,
    kept: Per,
    kept_maps: Per = Per(0),  # noqa: B008 (a tuple)
) -> Counts:
    phases: tuple[Phase, ...] = ("forward", "backward", "inference")
    return Counts(
        stream={phase: Per(value) for phase, value in zip(phases, stream, strict=True)},
        narrow=dict(zip(phases, narrow, strict=True)),
        attention=dict(zip(phases, attention, strict=True)),
        kept=kept,
        kept_maps=kept_maps,
    )


def _both(forward: Per, backward: Per) -> tuple[Per, Per, Per]:
    return forward, backward, forward


# By kernels, family and whether the data type is bfloat16. Inference is a teacher's, whose stream
# has the data type of its matrix products.
COUNTS: dict[tuple[Kernels, str, bool], Counts] = {
    ("fused", "swinv2", True): _counts(
        (24, 28, 12),
        (12, 8, 0),
        _both(Per(8, 14), Per(16, 50)),
        kept=Per(32, 4),
    ),
    ("fused", "vit", True): _counts(
        (28, 52, 18),
        (10, 18, 0),
        _both(Per(8, 5), Per(17, 80)),
        kept=Per(40, 4),
    ),
    ("fused", "swin", True): _counts(
        (28, 54, 18),
        (10, 18, 0),
        _both(Per(8, 5), Per(16, 30)),
        kept=Per(40, 4),
    ),
    ("reference", "swinv2", True): _counts(
        (80, 100, 60),
        (4, 0, 0),
        (Per(84, 46, 28, 16, 8), Per(250, 107, 28, 16), Per(84, 46, 28, 16, 8)),
        kept=Per(36, 4),
        kept_maps=Per(16, 16, 6),
    ),
    ("reference", "swinv2", False): _counts(
        (56, 88, 40),
        (0, 0, 0),
        (Per(88, 44, 16, 32, 8), Per(260, 106, 16, 32), Per(88, 44, 16, 32, 8)),
        kept=Per(64, 4),
        kept_maps=Per(12, 16, 4),
    ),
    ("reference", "vit", True): _counts(
        (96, 148, 52),
        (12, 12, 0),
        (Per(60, 0, 28), Per(66, 0, 28), Per(48, 0, 28)),
        kept=Per(44, 4),
        kept_maps=Per(0, 0, 6),
    ),
    ("reference", "vit", False): _counts(
        (72, 136, 40),
        (0, 0, 0),
        (Per(64, 0, 16), Per(76, 0, 16), Per(40, 0, 16)),
        kept=Per(72, 4),
        kept_maps=Per(0, 0, 4),
    ),
    ("reference", "swin", True): _counts(
        (80, 106, 52),
        (12, 12, 0),
        (Per(48, 0, 28, 16, 8), Per(60, 0, 28, 16), Per(48, 0, 28, 16, 8)),
        kept=Per(40, 4),
        kept_maps=Per(0, 0, 6),
    ),
    ("reference", "swin", False): _counts(
        (56, 100, 40),
        (0, 0, 0),
        (Per(40, 0, 16, 32, 8), Per(64, 0, 16, 32), Per(40, 0, 16, 32, 8)),
        kept=Per(68, 4),
        kept_maps=Per(0, 0, 4),
    ),
}
# Exact GELU on the 4 C channels of the MLP: forward reads and writes, backward reads two tensors.
ACTIVATION = {"forward": 2, "backward": 3, "inference": 2}
# Three operations in the forward pass of a teacher, where no kernel fuses them. No student has it.
QUICK_GELU = 7
# Bytes per input token and channel of patch embedding and of merging, and per output token and
# channel of final norm, projection and loss: with a float32 stream, and with a narrow one. Small
# beside the blocks.
_ENDS = {
    True: {"forward": (14, 21, 64), "backward": (18, 23, 42)},
    False: {"forward": (4, 6, 60), "backward": (6, 7, 36), "inference": (4, 6, 4)},
}
# The same where one kernel writes the stream in both data types.
_FUSED_ENDS = {
    True: {"forward": (8, 8, 64), "backward": (10, 9, 24)},
    False: {"forward": (4, 6, 60), "backward": (8, 8, 18), "inference": (4, 6, 4)},
}
# Bytes per value of a pixel from uint8 to normalised, for student and teacher.
_PIXEL = 2 * 35


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
        width: C, channels.
        depth: Number of blocks.
        tokens: T, tokens of an image.
        heads: h, attention heads.
        group: N, tokens that attend to each other.
        shifted: Number of blocks whose windows are shifted.
    """

    width: int
    depth: int
    tokens: int
    heads: int
    group: int
    shifted: int


def moved(
    architecture: FamilyArchitecture,
    phase: Phase,
    *,
    image_size: int,
    kernels: Kernels,
    bfloat16: bool,
    float32_stream: bool,
) -> dict[str, float]:
    """Returns the bytes read and written per image beside matrix products, by class of operation.

    Args:
        architecture: Of families swinv2, swin or vit; a model of timm moves 0 here.
        phase: forward and backward of a student, inference of a teacher.
        image_size: Side in pixels.
        kernels: Kernels that run.
        bfloat16: Whether the data type is bfloat16; else float32.
        float32_stream: Whether the residual stream is float32.
    """
    total = dict.fromkeys(CLASSES, 0.0)
    if not isinstance(architecture, Transformer):
        return total
    counts = counts_of(architecture, kernels, bfloat16)
    size = 2 if bfloat16 else 4
    fused = kernels == "fused" and bfloat16
    both = fused and isinstance(architecture, SwinV2Architecture)
    ends = (_FUSED_ENDS if both else _ENDS)[float32_stream][phase]
    first = last = None
    for stage in stages(architecture, image_size):
        first, last = first or stage, stage
        stream = counts.stream[phase]
        if not float32_stream:
            stream = stream._replace(channels=stream.channels - counts.narrow[phase])
        attention = counts.attention[phase]
        is_vit = isinstance(architecture, ViTArchitecture)
        if is_vit and architecture.relative_position == "none":
            attention = attention._replace(maps=max(0.0, attention.maps - 8))
        total["stream"] += _of(stream, stage)
        total["attention"] += _of(attention, stage)
        hidden = architecture.mlp_ratio * stage.width
        quick = is_vit and architecture.activation == "quick_gelu" and not fused
        passes = QUICK_GELU if quick else ACTIVATION[phase]
        total["activation"] += passes * size * stage.tokens * hidden * stage.depth
        if stage is not first:
            total["stream"] += ends[1] * stage.tokens * 2 * stage.width
    if phase == "inference":
        total["stream"] += _PIXEL * 3 * image_size**2
    assert first is not None
    assert last is not None
    total["stream"] += ends[0] * first.tokens * first.width
    total["stream"] += ends[2] * last.tokens * last.width
    return total


def kept(
    architecture: FamilyArchitecture,
    *,
    image_size: int,
    kernels: Kernels,
    bfloat16: bool,
    float32_stream: bool,
    keep_maps: bool,
    checkpoint_every: int,
) -> float:
    """Returns the bytes per image stored for the backward pass, one block's own ones included.

    Args:
        architecture: Of a student.
        image_size: Side in pixels.
        kernels: Kernels that run.
        bfloat16: Whether the data type is bfloat16; else float32.
        float32_stream: Whether the residual stream is float32.
        keep_maps: Whether attention maps are stored, as on CPUs.
        checkpoint_every: Every k-th block stores its input only; 0: none does.
    """
    counts = counts_of(architecture, kernels, bfloat16)
    inputs = 4 if float32_stream or not bfloat16 else 2
    is_swinv2 = isinstance(architecture, SwinV2Architecture)
    if is_swinv2 and bfloat16 and float32_stream:
        inputs += 2  # A block also takes the stream in the narrow data type.
    total = largest = 0.0
    for stage in stages(architecture, image_size):
        block = _of(counts.kept, stage) / stage.depth
        if keep_maps:
            block += _of(counts.kept_maps, stage) / stage.depth
        if not float32_stream and not is_swinv2:
            block -= 4 * stage.tokens * stage.width
        largest = max(largest, block)
        saved = stage.depth // checkpoint_every if checkpoint_every else 0
        total += (stage.depth - saved) * block + saved * inputs * stage.tokens * stage.width
    return total + (largest if checkpoint_every else 0.0)


def tables_kept(architecture: FamilyArchitecture, *, image_size: int) -> float:
    """Returns the bytes of SwinV2's position biases stored for the backward pass, for any batch.

    They are computed once per step, outside of the blocks, so that checkpoints do not matter: the
    hidden layer of each MLP, the sigmoid, and the table.
    """
    if not isinstance(architecture, SwinV2Architecture):
        return 0.0
    total = 0.0
    for stage in stages(architecture, image_size):
        offsets = (2 * math.isqrt(stage.group) - 1) ** 2
        mlps = 1 if architecture.shared_position_bias else stage.depth
        total += mlps * offsets * 4 * (POSITION_BIAS_WIDTH + 2 * stage.heads)
    return total


def counts_of(architecture: FamilyArchitecture, kernels: Kernels, bfloat16: bool) -> Counts:
    """Returns the table of a family.

    Fused kernels are counted in bfloat16 only; a float32 run counts as the reference, although
    kernels exist for it on GPUs.
    """
    return COUNTS[kernels if bfloat16 else "reference", architecture.family, bfloat16]


def _of(per: Per, stage: Stage) -> float:
    tokens, entries = stage.tokens, stage.tokens * stage.group * stage.heads
    every = per.channels * tokens * stage.width + per.heads * tokens * stage.heads
    every += per.maps * entries
    shifted = per.shifted_channels * tokens * stage.width + per.shifted_maps * entries
    return stage.depth * every + stage.shifted * shifted


def stages(a: Transformer, image_size: int) -> Iterator[Stage]:
    """Yields the stages of a model of swinv2, swin or vit; a ViT has one."""
    side = image_size // a.patch_size
    if isinstance(a, ViTArchitecture):
        tokens = side * side + bool(a.class_token) + bool(a.distillation_token)
        yield Stage(a.embed_dim, a.depths[0], tokens, a.num_heads[0], tokens, 0)
        return
    for i, (depth, heads) in enumerate(zip(a.depths, a.num_heads, strict=True)):
        window = min(a.window_size, side)
        shifted = depth // 2 if side > window else 0
        yield Stage(a.embed_dim * 2**i, depth, side * side, heads, window * window, shifted)
        side = -(-side // 2)
