"""Floating-point operations of a step, from the architectures alone.

Matrix products are counted, 2 operations per multiply-add, as torch.utils.flop_counter counts them
on the reference kernels: convolutions, linear layers, q k^T and the weighted sum of values. Norms,
softmax, activations and the loss are not; they take as long as the bytes that they move
(`plan.traffic`).

The backward pass takes two products for each product of the forward pass, one for the gradient of
the input and one for that of the weight; products of images or coordinates need the latter only.
SwinV2's position-bias MLPs run once per forward pass, whatever the batch. Recomputation is counted
separately: the forward pass of each checkpointed block, and q k^T of every block whose attention
maps are computed again in the backward pass.

Utilisation follows from these: model FLOPs (student forward and backward, teacher forward) over the
peak is MFU; with recomputation it is hardware utilisation.

Models of timm can be counted if `parameters.TIMM` lists them; models of your own cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.errors import ConfigError
from fd_large.plan.parameters import POSITION_BIAS_WIDTH, timm_counts, width
from fd_large.recipes.family import FamilyArchitecture, Transformer, WindowedTransformer

Kind = Literal[
    "patches",
    "qkv",
    "logits",
    "values",
    "proj",
    "mlp",
    "merging",
    "position bias",
    "projection",
    "timm",
]
ATTENTION: tuple[Kind, ...] = ("logits", "values")


@dataclass(frozen=True, kw_only=True)
class Product:
    """Matrix products (rows, inner) x (inner, columns), `count` of them.

    Attributes:
        kind: What they are for.
        stage: Number of the stage, from 0; -1 outside of all stages.
        rows: Rows of one product, for one image.
        inner: Elements that are summed over.
        columns: Columns of the result.
        count: Products per forward pass, for one image.
        once: Whether they run once for the whole batch instead of once per image.
        input_gradient: Whether the backward pass also needs the gradient of the input.
        in_block: Whether a checkpointed block computes them again.
    """

    kind: Kind
    stage: int
    rows: int
    inner: int
    columns: int
    count: int = 1
    once: bool = False
    input_gradient: bool = True
    in_block: bool = False

    def forward(self, batch: int) -> int:
        """Returns the FLOPs of a forward pass of `batch` images."""
        images = 1 if self.once else batch
        return 2 * self.rows * self.inner * self.columns * self.count * images

    def backward(self, batch: int) -> int:
        """Returns the FLOPs of the backward pass."""
        return self.forward(batch) * (2 if self.input_gradient else 1)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one micro-batch on one rank."""

    student_forward: int
    student_backward: int
    teacher_forward: int
    recomputation: int

    @property
    def model(self) -> int:
        """FLOPs that the run needs: the numerator of MFU."""
        return self.student_forward + self.student_backward + self.teacher_forward

    @property
    def hardware(self) -> int:
        """FLOPs that are computed, recomputation included."""
        return self.model + self.recomputation


def products(
    architecture: FamilyArchitecture, *, image_size: int = 0, size_rule: str = "drop"
) -> list[Product]:
    """Returns the matrix products of a model's forward pass.

    Args:
        architecture: Of the model.
        image_size: Side in pixels; 0: the architecture's own, or 224.
        size_rule: As in `student.size_rule`: "pad" pads images and, in attention, windows.

    Raises: ConfigError: if the model cannot be counted.
    """
    if not isinstance(architecture, Transformer):
        counts, pixels = timm_counts(architecture), (image_size or 224) ** 2
        return [Product(kind="timm", stage=-1, rows=pixels, inner=1, columns=counts.macs_per_pixel)]
    size = image_size or architecture.image_size
    if isinstance(architecture, ViTArchitecture):
        return list(_vit(architecture, size))
    if isinstance(architecture, WindowedTransformer):
        return list(_swin(architecture, size, pad=size_rule == "pad"))
    raise ConfigError(
        f"plan: the FLOPs of this family are not known; got {architecture.family}, expected vit, "
        "swin or swinv2. Plan with a model of these that is near in size."
    )


def forward(
    architecture: FamilyArchitecture,
    *,
    image_size: int = 0,
    batch: int = 1,
    size_rule: str = "drop",
) -> int:
    """Returns the FLOPs of a forward pass of `batch` images, position-bias MLPs included once."""
    table = products(architecture, image_size=image_size, size_rule=size_rule)
    return sum(product.forward(batch) for product in table)


def projection(
    student: FamilyArchitecture, teacher: FamilyArchitecture, *, image_size: int
) -> Product:
    """Returns the product of the projection from the student's width to the teacher's.

    Args:
        student: Its architecture.
        teacher: Its architecture.
        image_size: Side of the student's images, in pixels.

    Raises: ConfigError: if the teacher cannot be counted.
    """
    tokens = map_side(student, image_size) ** 2
    # Prefix tokens that the other model lacks are dropped before the projection.
    if student.num_prefix_tokens == teacher.num_prefix_tokens:
        tokens += student.num_prefix_tokens
    return Product(
        kind="projection", stage=-1, rows=tokens, inner=width(student), columns=width(teacher)
    )


def step_flops(
    student: Sequence[Product],
    teacher: Sequence[Product] = (),
    *,
    micro_batch_size: int,
    attention_recomputed: bool,
    checkpointed_share: float = 0.0,
) -> StepFlops:
    """Returns the FLOPs of one micro-batch.

    Args:
        student: Products of everything that is trained.
        teacher: Products of the teacher; none without one.
        micro_batch_size: Images.
        attention_recomputed: Whether the backward pass computes the student's attention maps again,
            as on GPUs.
        checkpointed_share: Fraction of the student's blocks that is checkpointed.
    """
    batch = micro_batch_size
    again = checkpointed_share * sum(p.forward(batch) for p in student if p.in_block)
    if attention_recomputed:
        again += sum(p.forward(batch) for p in student if p.kind == "logits")
    return StepFlops(
        student_forward=sum(p.forward(batch) for p in student),
        student_backward=sum(p.backward(batch) for p in student),
        teacher_forward=sum(p.forward(batch) for p in teacher),
        recomputation=int(again),
    )


def checkpointed_share(depths: Sequence[int], every: int) -> float:
    """Returns the fraction of blocks that is checkpointed, if every k-th one is."""
    return (sum(depths) // every) / sum(depths)


def map_side(architecture: FamilyArchitecture, image_size: int) -> int:
    """Returns the number of tokens along a side of the feature map."""
    if not isinstance(architecture, Transformer):
        return image_size // architecture.feature_stride
    side = image_size // architecture.patch_size
    for _ in architecture.depths[1:]:
        side = -(-side // 2)
    return side


def _swin(a: WindowedTransformer, image_size: int, *, pad: bool) -> Iterator[Product]:
    side = -(-image_size // a.patch_size) if pad else image_size // a.patch_size
    own_side = a.image_size // a.patch_size
    yield Product(
        kind="patches",
        stage=-1,
        rows=side * side,
        inner=3 * a.patch_size**2,
        columns=a.embed_dim,
        input_gradient=False,
    )
    for stage, (depth, heads) in enumerate(zip(a.depths, a.num_heads, strict=True)):
        c = a.embed_dim * 2**stage
        # Swin V1's windows are as large as its tables; SwinV2 fits them to the map.
        own = side if isinstance(a, SwinV2Architecture) else own_side // 2**stage
        window = min(a.window_size, own)
        windows = -(-side // window)
        tokens, in_windows = side * side, (windows * window) ** 2
        yield from _block(
            stage,
            depth,
            c,
            heads,
            int(c * a.mlp_ratio),
            tokens=tokens,
            padded=in_windows,
            group=window * window,
        )
        if isinstance(a, SwinV2Architecture):
            mlps = 1 if a.shared_position_bias else depth
            rows = (2 * window - 1) ** 2
            for inner, columns, in_gradient in (
                (2, POSITION_BIAS_WIDTH, False),
                (POSITION_BIAS_WIDTH, heads, True),
            ):
                yield Product(
                    kind="position bias",
                    stage=stage,
                    rows=rows,
                    inner=inner,
                    columns=columns,
                    count=mlps,
                    once=True,
                    input_gradient=in_gradient,
                )
        if stage + 1 < len(a.depths):
            side = -(-side // 2)
            yield Product(kind="merging", stage=stage, rows=side * side, inner=4 * c, columns=2 * c)


def _vit(a: ViTArchitecture, image_size: int) -> Iterator[Product]:
    c, side = a.embed_dim, image_size // a.patch_size
    yield Product(
        kind="patches",
        stage=-1,
        rows=side * side,
        inner=3 * a.patch_size**2,
        columns=c,
        input_gradient=False,
    )
    tokens = side * side + bool(a.class_token) + bool(a.distillation_token)
    yield from _block(
        0,
        a.depths[0],
        c,
        a.num_heads[0],
        int(c * a.mlp_ratio),
        tokens=tokens,
        padded=tokens,
        group=tokens,
    )


def _block(
    stage: int,
    depth: int,
    c: int,
    heads: int,
    hidden: int,
    *,
    tokens: int,
    padded: int,
    group: int,
) -> Iterator[Product]:
    """Yields the products of a stage; attention has `padded` tokens in groups of `group`."""

    def product(kind: Kind, rows: int, inner: int, columns: int, count: int = 1) -> Product:
        return Product(
            kind=kind,
            stage=stage,
            rows=rows,
            inner=inner,
            columns=columns,
            count=count * depth,
            in_block=True,
        )

    maps = padded // group * heads
    yield product("qkv", tokens, c, 3 * c)
    yield product("logits", group, c // heads, group, maps)
    yield product("values", group, group, c // heads, maps)
    yield product("proj", tokens, c, c)
    yield product("mlp", tokens, c, hidden)
    yield product("mlp", tokens, hidden, c)
