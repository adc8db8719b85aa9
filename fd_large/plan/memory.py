"""Computes the bytes that a rank holds between two steps, from counts of elements.

P is the number of parameters of student and projection, W is the number of ranks, and b is the
number of bytes of a parameter (2 in bfloat16, 4 in float32). T and B are the teacher's P and b.
With the two moments of AdamW (4P bytes each; another optimiser may keep more or fewer), DeepSpeed
0.19.8 keeps these bytes between steps:

| ZeRO | parameters | master weights | moments | gradients             |
|------|------------|----------------|---------|-----------------------|
| 0    | bP         | none           | 8P      | W > 1: 4P, else none  |
| 1    | bP         | bf16: 4P/W     | 8P/W    | bf16: 4P, else 4P/W   |
| 2    | bP         | bf16: 4P/W     | 8P/W    | 4P/W                  |
| 3    | bP/W + bK  | 4P/W           | 8P/W    | 4P/W                  |

- Stage 0 trains the parameters themselves, and exists in float32 only. Over several ranks the
  buckets of the gradients stay allocated.
- Stages 1 and 2 in float32 have no master weights besides the parameters, unless the optimiser is
  offloaded (4P/W). At stage 3 master weights are a copy even of float32 parameters. (DeepSpeed is
  meant to share the float32 shards, but compares a torch.device with a string, which is never
  equal.)
- Stage 1 in bfloat16 with float32 accumulation keeps a float32 gradient of the whole model on each
  rank: 12 GB for three billion parameters.
- Stage 2, and stage 1 in float32, keep two buckets in the data type in which gradients are summed
  over ranks (engine/zero/gradient_reduction.py). A bucket has `reduce_bucket_size` elements, but no
  more than a shard on up to `MOST_OWNERS` ranks, or than all parameters on more ranks. With the
  optimiser in host memory DeepSpeed itself reduces the gradients, and the device keeps neither
  these buckets nor gradients.
- Stage 3 shards each tensor of n elements into ceil(n / W) elements per rank, and keeps a flat
  float32 buffer for the shards of the gradients. K is the number of elements in tensors of at most
  `stage3_param_persistence_threshold` elements. These tensors are whole on every rank besides their
  shards, from their first use to the step.
- hpZ's second copy of the parameters inside a node takes bP/G for groups of G ranks. This copy
  exists only from the forward pass to the step.
- Offloading the optimiser moves master weights, moments and gradients to host memory, where a
  float32 gradient for the step (4P/W) stays too. Stages 1 and 2 add a copy of the shard for the
  transfer back (bP/W), and a buffer of the largest tensor on the host and on the device. Offloading
  parameters moves the shards, but K stays on the device.
- With the optimiser on a disk (`offload_optimizer.device` nvme; fd_large's own files,
  docs/disk.md), the disk has master weights, moments and one gradient, in which gradients are
  summed and which the optimiser reads. This is (8 + 4M)P/W for an optimiser with M moments, and
  4P/W more for an average of the weights. If `offload_param` is on the disk too, bP/W of weights
  are added.
- A stage 3 engine with `contiguous_gradients` owns one bucket of `reduce_bucket_size` elements, in
  the data type in which gradients are summed over ranks. In ds_configs/, the configurations that
  offload have this setting.
- A teacher takes BT if it is whole. If it is sharded over S ranks, it takes BT/S, tensor by tensor,
  and B times the elements of its tensors up to the threshold. A teacher has no gradients, master
  weights or moments. Several teachers take the sum.

Stages 1 and 2 pad a parameter group by a few elements, which are not counted.
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
    """Settings that determine where a run's state is kept: ZeRO's settings, ranks and data types.

    Attributes:
        stage: ZeRO stage.
        world_size: Number of ranks.
        node_size: Number of ranks in a node.
        bfloat16: Whether the run computes in bfloat16.
        teacher_bfloat16: Whether the teacher is in bfloat16.
        teacher_placement: Placement of the teacher, as in the recipe.
        persistence_threshold: Largest number of elements of a student's tensor that stays whole at
            stage 3.
        teacher_persistence_threshold: Largest number of elements of a sharded teacher's tensor that
            stays whole.
        hpz_size: Number of ranks over which hpZ's second copy is sharded; 1 without hpZ.
        offload_optimizer: Whether the optimiser's state is in host memory or on a disk.
        optimizer_on_disk: Whether the optimiser's state is on a disk.
        offload_param: Whether the shards of parameters are in host memory or on a disk.
        weights_on_disk: Whether the shards of parameters are on a disk.
        bucket_size: Number of gradient elements in a bucket; 0 if no bucket is kept.
        float32_sums: Whether gradients are summed over ranks in float32.
    """

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
        """Returns the placement of a run with a recipe and a DeepSpeed configuration.

        Args:
            teacher: The recipe's section of the teacher.
            zero: The section `zero_optimization` of the DeepSpeed configuration, in which every
                "auto" was replaced by a value.
            world_size: Number of ranks.
            node_size: Number of ranks in a node.
            bfloat16: Whether the run computes in bfloat16.
            teacher_persistence_threshold: Largest number of elements of a sharded teacher's tensor
                that stays whole. The student's threshold is that in `zero`.
            float32_sums: Whether gradients are summed over ranks in float32.

        Raises: ConfigError: if a value in `zero` is "auto".
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
    """Numbers of bytes in one memory: that of the device, that of the host, or a disk.

    Attributes:
        parameters: Bytes of the trained parameters.
        masters: Bytes of float32 master weights.
        moments: Bytes of the optimiser's moments.
        gradients: Bytes of gradients.
        teacher: Bytes of the teacher.
        buckets: Bytes of buffers for communication and transfers.
    """

    parameters: int = 0
    masters: int = 0
    moments: int = 0
    gradients: int = 0
    teacher: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        """Sum of all attributes, in bytes."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a rank keeps between steps, in each kind of memory.

    Attributes:
        device: Bytes on the GPU, or, for a CPU rank, in the memory of the process.
        host: Bytes that are offloaded to host memory.
        disk: Bytes in files on a disk, whose pages are cached in memory as far as there is room.
        hpz_copy: Bytes of hpZ's second copy of the parameters, which is on the device only from
            the forward pass to the step.
    """

    device: Held
    host: Held = field(default_factory=Held)
    disk: Held = field(default_factory=Held)
    hpz_copy: int = 0


def held(
    student: Sequence[int], teacher: Sequence[int], place: Placement, *, moments: int = 2
) -> Memory:
    """Returns the bytes that a rank keeps between two steps.

    Args:
        student: Number of elements of each trained tensor, in the student and its projection.
        teacher: Number of elements of each tensor of the teacher.
        place: Settings that determine where the state is kept.
        moments: Number of float32 values that the optimiser keeps for each parameter.
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
    """Whether gradients are summed over ranks in float32, if the DeepSpeed JSON does not set this.

    Args:
        ranks: Number of ranks.
        bfloat16: Whether the run computes in bfloat16.
    """
    return not bfloat16 or ranks > MOST_BFLOAT16_SUMMANDS


def persistence_threshold(sizes: Iterable[int]) -> int:
    """Returns the number of elements up to which a tensor stays whole on every rank at stage 3.

    All tensors up to this size together have at most the fraction `PERSISTENCE_SHARE` of all
    elements. The result is 0 if even the smallest tensors together have more than this fraction.

    Args:
        sizes: Number of elements of each tensor of student and teacher.
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
