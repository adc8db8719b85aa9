"""The settings that a plan chooses, such as the ZeRO stage and the micro-batch size.

A plan also chooses the placement of the teachers and whether to use activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fd_large.plan.buckets import MOST_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible choice of settings for a run.

    Attributes:
        stage: ZeRO stage.
        hpz: Whether hpZ is used, with a second copy of the parameters sharded inside each node.
        teacher: Placement of the teachers, as in the recipe's `teacher.placement`.
        whole: Number of teachers that stay whole on every rank, which are the smallest teachers.
        checkpointing: Whether activation checkpointing is used, so that a block stores only its
            input for the backward pass.
        micro_batch_size: Number of images in a micro-batch of a rank.
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
        """Returns the command-line flags that change a recipe's settings to this candidate's.

        Args:
            micro_batch_size: The recipe's `batch.micro_batch_size`.
            placements: The recipe's `placement` of each teacher, by the name of its section.
            activation_checkpointing: The recipe's `student.activation_checkpointing`.
            whole: Names of the sections of the teachers that stay whole.

        Returns: flags of `train`, such as "--batch.micro_batch_size 32", without DeepSpeed's
            configuration. A setting has no flag if the recipe already has the candidate's value.
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
        """Name of the DeepSpeed JSON in ds_configs/ that has the settings of `deepspeed()`.

        For stage 0 this is the JSON of stage 1, since the engine turns stage 1 into stage 0 on a
        single rank.
        """
        return "zero3_hpz" if self.hpz else f"zero{max(1, self.stage)}"

    def deepspeed(self) -> dict[str, Any]:
        """Returns this candidate's DeepSpeed configuration.

        In it, "auto" stands for each value that a run fills in when it starts.
        """
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
