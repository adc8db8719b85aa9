"""Computes the bytes that a rank holds between two steps, from counts of elements.

P is the number of parameters of student and projection, W the number of ranks, b the bytes of a
parameter (2 in bfloat16, 4 in float32); T and B are the teacher's P and b. DeepSpeed 0.19.8 keeps
between steps, with the two moments of AdamW (4P each; another optimiser may keep more or fewer):

| ZeRO | parameters | masters        | moments | gradients             |
|------|------------|----------------|---------|-----------------------|
| 0    | bP         | none           | 8P      | W > 1: 4P, else none  |
| 1    | bP         | bf16: 4P/W     | 8P/W    | bf16: 4P, else 4P/W   |
| 2    | bP         | bf16: 4P/W     | 8P/W    | 4P/W                  |
| 3    | bP/W + bK  | 4P/W           | 8P/W    | 4P/W                  |

- Stage 0 trains the parameters themselves; it exists in float32 only. Over several ranks the
  gradients' buckets stay.
- Stages 1 and 2 in float32 have no masters besides the parameters, unless the optimiser is
  offloaded (4P/W). At stage 3 masters are a copy even of parameters that are float32. (DeepSpeed
  means to share the float32 shards, but compares a torch.device with a string, which is never
  equal.)
- Stage 1 in bfloat16 with float32 accumulation keeps a float32 gradient of the whole model on each
  rank: 12 GB for three billion parameters.
- Stage 2, and stage 1 in float32, keep two buckets of `reduce_bucket_size` elements (at most of a
  shard on up to `MOST_OWNERS` ranks, of the whole on more), in the data type in which gradients are
  summed over ranks (engine/zero/gradient_reduction.py). With the optimiser in host memory DeepSpeed
  itself reduces the gradients, and the device keeps neither these buckets nor gradients.
- Stage 3 shards tensor by tensor, ceil(n / W) elements each, and keeps a flat float32 buffer for
  the gradients' shards. K, the tensors of at most `stage3_param_persistence_threshold` elements,
  is whole on every rank beside its shards, from their first use to the step.
- hpZ's second copy inside the node exists from the forward pass to the step only: bP/G for groups
  of G ranks.
- Offloading the optimiser moves masters, moments and gradients to host memory, where the step's
  own float32 gradient (4P/W) stays too; stages 1 and 2 add a copy of the partition for the transfer
  back (bP/W) and a buffer of the largest tensor on either side. Offloading parameters moves the
  shards; K stays on the device.
- On a disk (`offload_optimizer.device` nvme; our own files, docs/disk.md) are masters, moments and
  one gradient, in which gradients are summed and from which the optimiser steps: (8 + 4M)P/W of an
  optimiser with M moments, 4P/W more for an average of the weights; with `offload_param` there,
  too, bP/W of weights.
- A stage 3 engine with `contiguous_gradients` owns one bucket of `reduce_bucket_size` elements, in
  the data type in which gradients are summed over ranks: in ds_configs/, those that offload.
- The teacher takes BT whole; split over S ranks BT/S, tensor by tensor, and B times its tensors
  under the threshold. It has no gradients, masters or moments. Several teachers take the sum.

Stages 1 and 2 pad a group by a few elements, which is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from fd_large.errors import ConfigError
from fd_large.plan.buckets import MOST_OWNERS

if TYPE_CHECKING:
    from fd_large.tasks.distillation.section import Teacher

# DeepSpeed's defaults of keys that a JSON leaves out.
DEFAULT_PERSISTENCE_THRESHOLD = 100_000
DEFAULT_BUCKET_SIZE = 500_000_000
# Tensors so small that together they hold a hundredth of all elements stay whole on every rank.
PERSISTENCE_SHARE = 0.01
# The largest number of ranks over which gradients are summed in bfloat16. The partial sum of a ring
# is rounded at every hop: over more ranks the mean gradient is more than 1% off (docs/numerics.md).
MOST_BFLOAT16_SUMMANDS = 64


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The facts that decide where bytes are held: the JSON's ZeRO block, ranks, data types."""

    stage: Literal[0, 1, 2, 3]
    world_size: int
    node_size: int
    bfloat16: bool
    teacher_bfloat16: bool
    teacher_placement: Literal["replicated", "sharded", "node"] = "replicated"
    persistence_threshold: int = DEFAULT_PERSISTENCE_THRESHOLD
    teacher_persistence_threshold: int = DEFAULT_PERSISTENCE_THRESHOLD
    hpz_size: int = 1
    offload_optimizer: bool = False
    optimizer_on_disk: bool = False
    offload_param: bool = False
    weights_on_disk: bool = False
    bucket_size: int = 0
    float32_sums: bool = False

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        zero: Mapping[str, Any],
        *,
        world_size: int,
        node_size: int,
        bfloat16: bool,
        teacher_persistence_threshold: int,
        float32_sums: bool,
    ) -> Placement:
        """Returns the placement of a run.

        Args:
            teacher: The recipe's section of the teacher.
            zero: `zero_optimization` of the JSON, every "auto" filled.
            world_size: Number of ranks.
            node_size: Number of ranks in a node.
            bfloat16: Whether the run computes in bfloat16.
            teacher_persistence_threshold: Largest tensor, in elements, of a split teacher that
                stays whole; the JSON's own threshold holds for the student.
            float32_sums: Whether gradients are summed over ranks in float32.
        """
        for key, value in zero.items():
            if value == "auto":
                raise ConfigError(
                    f"zero_optimization.{key}: not filled; got 'auto', expected a value. Fill in"
                    " the DeepSpeed JSON before counting memory."
                )
        return cls(
            stage=zero.get("stage", 0),
            world_size=world_size,
            node_size=node_size,
            bfloat16=bfloat16,
            teacher_bfloat16=bfloat16 if teacher.dtype == "auto" else teacher.dtype == "bfloat16",
            teacher_placement=teacher.placement,
            persistence_threshold=zero.get(
                "stage3_param_persistence_threshold", DEFAULT_PERSISTENCE_THRESHOLD
            ),
            teacher_persistence_threshold=teacher_persistence_threshold,
            hpz_size=zero.get("zero_hpz_partition_size", 1),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            optimizer_on_disk=zero.get("offload_optimizer", {}).get("device") == "nvme",
            offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
            weights_on_disk=zero.get("offload_param", {}).get("device") == "nvme",
            bucket_size=(
                int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE))
                if zero.get("stage", 0) < 3 or zero.get("contiguous_gradients", True)
                else 0
            ),
            float32_sums=float32_sums,
        )


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes in one kind of memory, by contents."""

    parameters: int = 0
    masters: int = 0
    moments: int = 0
    gradients: int = 0
    teacher: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        """The sum of all these bytes."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank holds between steps.

    Attributes:
        device: Bytes on the GPU; on CPU ranks, in the memory of the process.
        host: Bytes that are offloaded to host memory.
        disk: Bytes in files on a disk, whose pages are cached in memory as far as there is room.
        hpz_copy: Further bytes on the device, from the forward pass to the step only.
    """

    device: Held
    host: Held = field(default_factory=Held)
    disk: Held = field(default_factory=Held)
    hpz_copy: int = 0


def held(
    student: Sequence[int], teacher: Sequence[int], place: Placement, *, moments: int = 2
) -> Memory:
    """Returns the bytes of one rank between steps, after the first step.

    Args:
        student: Elements of each trained tensor: student and projection.
        teacher: Elements of each tensor of the teacher.
        place: Stage, ranks, data types and offload.
        moments: Float32 numbers that the optimiser keeps of each parameter.
    """
    ranks, total = place.world_size, sum(student)
    compute = 2 if place.bfloat16 else 4
    part = _shard(student, ranks) if place.stage == 3 else -(-total // ranks)
    whole = _persistent(student, place.persistence_threshold)
    device: dict[str, int] = {"teacher": _teacher(teacher, place)}
    host: dict[str, int] = {}
    disk: dict[str, int] = {}
    if place.stage == 0:
        device |= {"parameters": compute * total, "moments": 4 * moments * total}
        device["gradients"] = compute * total if ranks > 1 else 0
        return Memory(device=Held(**device))

    optimizer = host if place.offload_optimizer else device
    optimizer = disk if place.optimizer_on_disk else optimizer
    optimizer["moments"] = 4 * moments * part
    if place.stage == 3:
        device["parameters"] = compute * whole
        shards = host if place.offload_param else device
        shards = disk if place.weights_on_disk else shards
        shards["parameters"] = shards.get("parameters", 0) + compute * part
        optimizer["masters"] = 4 * part
        optimizer["gradients"] = 4 * part
        device["buckets"] = (4 if place.float32_sums else compute) * place.bucket_size
    else:
        device["parameters"] = compute * total
        if place.bfloat16 or place.offload_optimizer:  # Else they are the parameters themselves.
            optimizer["masters"] = 4 * part
        if place.offload_optimizer:
            # For the new parameters on the way to the device, and for a tensor's gradient back.
            host["buckets"] = compute * (part + max(student))
            device["buckets"] = compute * max(student)
        elif place.stage == 1 and place.bfloat16:
            # DeepSpeed's BF16_Optimizer, which it takes at stage 1 for float32 accumulation.
            device["gradients"] = 4 * total
        else:
            device["gradients"] = 4 * part
            sent = 4 if place.float32_sums else compute
            most = part if ranks <= MOST_OWNERS else total
            device["buckets"] = 2 * sent * min(place.bucket_size, most)
    if place.offload_optimizer and not place.optimizer_on_disk:
        # In host memory the optimiser's own gradient is not freed.
        host["gradients"] = host.get("gradients", 0) + 4 * part
    copy = compute * _shard(student, place.hpz_size) if place.hpz_size > 1 else 0
    return Memory(device=Held(**device), host=Held(**host), disk=Held(**disk), hpz_copy=copy)


def sums_in_float32(ranks: int, *, bfloat16: bool) -> bool:
    """Returns whether gradients are summed over ranks in float32, unless a JSON says otherwise.

    Args:
        ranks: Number of ranks.
        bfloat16: Whether the run computes in bfloat16.
    """
    return not bfloat16 or ranks > MOST_BFLOAT16_SUMMANDS


def persistence_threshold(sizes: Iterable[int]) -> int:
    """Returns the largest size such that tensors up to it hold at most PERSISTENCE_SHARE of all.

    Args:
        sizes: Elements of each tensor of student and teacher.
    """
    counts = Counter(sizes)
    left = PERSISTENCE_SHARE * sum(size * count for size, count in counts.items())
    threshold = 0
    for size in sorted(counts):
        left -= size * counts[size]
        if left < 0:
            break
        threshold = size
    return threshold


def _shard(tensors: Iterable[int], ranks: int) -> int:
    return sum(-(-n // ranks) for n in tensors)


def _persistent(tensors: Iterable[int], threshold: int) -> int:
    return sum(n for n in tensors if n <= threshold)


def _teacher(tensors: Sequence[int], place: Placement) -> int:
    size = 2 if place.teacher_bfloat16 else 4
    ranks = {
        "replicated": 1,
        "sharded": place.world_size,
        "node": min(place.node_size, place.world_size),
    }[place.teacher_placement]
    if ranks == 1:
        return size * sum(tensors)
    return size * (
        _shard(tensors, ranks) + _persistent(tensors, place.teacher_persistence_threshold)
    )
