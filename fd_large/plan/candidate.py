"""The choices of a plan: ZeRO stage, placement of the teacher, checkpoints, micro-batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fd_large.plan.buckets import MOST_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A choice of settings for a workload.

    Attributes:
        stage: Stage of ZeRO.
        hpz: Whether each node holds a second copy of the parameters.
        teacher: Placement of the teachers, as in `teacher.placement`.
        whole: Number of teachers that stay whole on every rank, counted from the smallest.
        checkpointing: Whether blocks store their inputs only.
        micro_batch_size: Images of a rank in a pass.
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
        """Returns the flags of `train` for this candidate.

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
                f"{name}.placement": ("replicated" if name in whole else self.teacher, placement)
                for name, placement in placements.items()
            },
            "student.activation_checkpointing": (mode, activation_checkpointing),
        }
        return [
            f"--{name} {mine}" for name, (mine, in_recipe) in fields.items() if mine != in_recipe
        ]

    @property
    def shipped_config(self) -> str:
        """Name of the shipped DeepSpeed JSON that matches `deepspeed`.

        With a single rank the engine itself turns stage 1 into stage 0.
        """
        return "zero3_hpz" if self.hpz else f"zero{max(1, self.stage)}"

    def deepspeed(self) -> dict[str, Any]:
        """Returns the DeepSpeed JSON; the run fills in "auto"."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage > 0:
            zero["overlap_comm"] = True
            zero["reduce_bucket_size"] = "auto"
        if self.stage in (1, 2):
            zero["reduce_scatter"] = False
            zero["allgather_bucket_size"] = MOST_ELEMENTS
        elif self.stage == 3:
            zero["contiguous_gradients"] = False
            zero["stage3_prefetch_bucket_size"] = "auto"
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
