"""What a plan chooses among: ZeRO stage, placement of the teacher, checkpoints, micro-batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Elements, as in ds_configs/*.json; `bucket_elements` uses the smaller one.
BUCKET_ELEMENTS, LEAST_BUCKET_ELEMENTS = 100_000_000, 8_000_000
PREFETCH_ELEMENTS = 51_000_000


def bucket_elements(stage: int, parameters: int) -> int:
    """Returns how many elements of gradients are reduced together.

    Stage 3 owns a buffer of this size. At stages 1 and 2 it is small enough that reductions begin
    early in the backward pass, but makes at most about thirty messages, each of which has a cost.
    """
    if stage == 3:
        return BUCKET_ELEMENTS
    return min(BUCKET_ELEMENTS, max(LEAST_BUCKET_ELEMENTS, parameters // 30))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a workload, which a user may choose.

    Attributes:
        stage: Stage of ZeRO.
        hpz: Whether each node holds a second copy of the parameters.
        teacher: Where the teachers are held, as in `teacher.placement`.
        whole: Of several teachers, how many of the smallest are whole on every rank all the same.
        checkpointing: Whether blocks store their inputs only.
        micro_batch_size: Images of a rank in one pass.
    """

    stage: Literal[0, 1, 2, 3]
    hpz: bool = False
    teacher: Literal["replicated", "sharded", "node"] = "replicated"
    whole: int = 0
    checkpointing: bool = False
    micro_batch_size: int = 1

    def flags(
        self,
        *,
        micro_batch_size: int | str,
        placements: Mapping[str, str],
        activation_checkpointing: str,
        whole: Collection[str] = (),
    ) -> list[str]:
        """Returns the flags that make `train` use this candidate instead of the recipe's fields.

        Args:
            micro_batch_size: `batch.micro_batch_size` of the recipe.
            placements: `placement` of each teacher's section in the recipe, by its name.
            activation_checkpointing: `student.activation_checkpointing` of the recipe.
            whole: The names of the teachers that stay whole.
        """
        mode = activation_checkpointing
        if self.checkpointing != (mode != "off"):
            mode = "every" if self.checkpointing else "off"
        fields = {
            "batch.micro_batch_size": (self.micro_batch_size, micro_batch_size),
            **{
                f"{name}.placement": ("replicated" if name in whole else self.teacher, own)
                for name, own in placements.items()
            },
            "student.activation_checkpointing": (mode, activation_checkpointing),
        }
        return [f"--{name} {mine}" for name, (mine, own) in fields.items() if mine != own]

    def deepspeed(self, parameters: int) -> dict[str, Any]:
        """Returns the DeepSpeed JSON for that many parameters; the run fills in "auto"."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage > 0:
            zero["overlap_comm"] = True
            zero["reduce_bucket_size"] = bucket_elements(self.stage, parameters)
        if self.stage in (1, 2):
            zero["reduce_scatter"] = False
            zero["allgather_bucket_size"] = BUCKET_ELEMENTS
        elif self.stage == 3:
            zero["stage3_prefetch_bucket_size"] = PREFETCH_ELEMENTS
            zero["stage3_param_persistence_threshold"] = "auto"
            if self.hpz:
                zero["zero_hpz_partition_size"] = "auto"
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
        }
