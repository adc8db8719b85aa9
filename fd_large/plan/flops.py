"""Floating-point operations of a run, by arithmetic: the one place where they are counted.

Counted are matrix products, 2 operations per multiply-add, as torch.utils.flop_counter counts them
on the reference kernels: convolutions, linear layers, q k^T and the weighted sum of values. Norms,
softmax, activations and the loss are none; their time is that of the bytes they move
(`plan.traffic`).

Backward takes two products per product of the forward, one for the input's gradient and one for the
weight's; what reads images or coordinates needs the weight's only. SwinV2's position-bias MLPs run
once a forward, whatever the batch. Recomputation is counted apart: the forward of each checkpointed
block, and q k^T of every block whose attention maps are made again in backward.

Utilisation follows from these: model FLOPs (student forward and backward, teacher forward) over the
peak is MFU; with recomputation it is hardware utilisation.

Not countable here: models of timm but those of `parameters.TIMM`, and models of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.errors import ConfigError
from fd_large.plan.parameters import POSITION_BIAS_WIDTH, timm_counts, width
from fd_large.recipes.family import FamilyArchitecture, Transformer, WindowedTransformer
from fd_large.recipes.run import Run

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
        stage: From 0; -1 for what belongs to none.
        rows: Of one product, for one image.
        inner: Summed over.
        columns: Of the result.
        count: How many a forward, for one image.
        once: Whether the whole batch needs them once instead of each image.
        input_gradient: Whether backward also needs the gradient of the input.
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
        """FLOPs of a forward of `batch` images."""
        images = 1 if self.once else batch
        return 2 * self.rows * self.inner * self.columns * self.count * images

    def backward(self, batch: int) -> int:
        """FLOPs of the backward."""
        return self.forward(batch) * (2 if self.input_gradient else 1)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one micro batch on one rank."""

    student_forward: int
    student_backward: int
    teacher_forward: int
    recomputation: int

    @property
    def model(self) -> int:
        """What the run needs: the numerator of MFU."""
        return self.student_forward + self.student_backward + self.teacher_forward

    @property
    def hardware(self) -> int:
        """What is computed: with recomputation."""
        return self.model + self.recomputation


def products(
    architecture: FamilyArchitecture, *, image_size: int = 0, size_rule: str = "drop"
) -> list[Product]:
    """Returns the matrix products of a net's forward.

    Args:
        architecture: Every field of the family set, as `resolve` returns it.
        image_size: Side in pixels; 0: the architecture's own, or 224.
        size_rule: The student's: "pad" pads images and, in attention, windows.

    Raises: ConfigError: for a model that is not countable.
    """
    if not isinstance(architecture, Transformer):
        counts, pixels = timm_counts(architecture), (image_size or 224) ** 2
        return [Product(kind="timm", stage=-1, rows=pixels, inner=1, columns=counts.macs_per_pixel)]
    size = image_size or architecture.image_size
    if isinstance(architecture, ViTArchitecture):
        return list(_vit(architecture, size))
    return list(_swin(architecture, size, pad=size_rule == "pad"))


def forward(
    architecture: FamilyArchitecture,
    *,
    image_size: int = 0,
    batch: int = 1,
    size_rule: str = "drop",
) -> int:
    """Returns the FLOPs of a net's forward of `batch` images, position-bias MLPs included once."""
    table = products(architecture, image_size=image_size, size_rule=size_rule)
    return sum(product.forward(batch) for product in table)


def student_products(run: Run) -> list[Product]:
    """Returns the products of a run's student, with its projection where there is a teacher."""
    student = run.student_architecture()
    table = products(student, image_size=run.data.image_size, size_rule=run.student.size_rule)
    if not run.has_teacher:
        return table
    teacher = run.teacher_architecture()
    tokens = map_side(student, run.data.image_size) ** 2
    # Prefix tokens that the other model lacks are dropped before the projection.
    if student.num_prefix_tokens == teacher.num_prefix_tokens:
        tokens += student.num_prefix_tokens
    projection = Product(
        kind="projection", stage=-1, rows=tokens, inner=width(student), columns=width(teacher)
    )
    return [*table, projection]


def teacher_products(run: Run) -> list[Product]:
    """Returns the products of a run's teacher; none without one."""
    if not run.has_teacher:
        return []
    return products(run.teacher_architecture(), image_size=teacher_image_size(run))


def of_run(run: Run, *, micro_batch_size: int, attention_recomputed: bool) -> StepFlops:
    """Returns the FLOPs of one micro batch of a run; a classifier's are left out.

    Args:
        run: Models, sizes and checkpointing.
        micro_batch_size: Images.
        attention_recomputed: Whether backward makes the student's attention maps again, as on GPUs.

    Raises: ConfigError: if the teacher is not countable, or the task is detection.
    """
    if run.task.name == "detection":
        raise ConfigError(
            "task.name: the FLOPs of heads on boxes depend on the images; got detection, expected "
            "distillation or finetune. Look at images per second."
        )
    student, batch = student_products(run), micro_batch_size
    again = 0
    if run.student.activation_checkpointing != "off":
        again += sum(p.forward(batch) for p in student if p.in_block) * _checkpointed_share(run)
    if attention_recomputed:
        again += sum(p.forward(batch) for p in student if p.kind == "logits")
    return StepFlops(
        student_forward=sum(p.forward(batch) for p in student),
        student_backward=sum(p.backward(batch) for p in student),
        teacher_forward=sum(p.forward(batch) for p in teacher_products(run)),
        recomputation=int(again),
    )


def teacher_image_size(run: Run) -> int:
    """Returns the side of the teacher's images: asked for, that of its positions, or the run's."""
    fixed = run.teacher_architecture().fixed_image_size
    return run.objective.teacher_image_size or fixed or run.data.image_size


def map_side(architecture: FamilyArchitecture, image_size: int) -> int:
    """Returns the tokens along a side of the feature map."""
    if not isinstance(architecture, Transformer):
        return image_size // architecture.feature_stride
    side = image_size // architecture.patch_size
    for _ in architecture.depths[1:]:
        side = -(-side // 2)
    return side


def _checkpointed_share(run: Run) -> float:
    """Of the blocks; which ones matters little, and k-th ones are spread over the stages."""
    total = sum(run.student_architecture().depths)
    return (total // run.student.checkpoint_every) / total


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
        # Swin V1's windows are those of its tables; SwinV2 fits them to the map.
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
            nets = 1 if a.shared_position_bias else depth
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
                    count=nets,
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
    """The products of a stage's blocks: attention on `padded` tokens in groups of `group`."""

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
