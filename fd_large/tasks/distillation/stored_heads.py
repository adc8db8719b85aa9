"""What the heads of a stored run make of its student's map: its guess of each teacher's map."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.tasks.distillation.heads.map_head import with_blocks
from fd_large.tasks.distillation.target import Target
from fd_large.tasks.distillation.task import Distillation


class StoredHead(nn.Module):
    """A trained head, with how it is given the student's map.

    Args:
        target: The target that it was trained for.
        num_prefix_tokens: Tokens before the patches of the teacher's map.
    """

    def __init__(self, target: Target, num_prefix_tokens: int) -> None:
        super().__init__()
        self.head = target.head
        self._target, self._prefix = target, num_prefix_tokens

    def forward(self, backbone: nn.Module, pixels: Tensor) -> FeatureMap:
        """Returns the guess, in the units of the target's normaliser; of a summary it is one place.

        Args:
            backbone: The run's student.
            pixels: (B, 3, H, W) float32, normalised for it.
        """
        if self._target.reads_blocks:
            student, blocks = with_blocks(backbone, pixels)
        else:
            student, blocks = backbone(pixels), ()
        return self._target.guessed(student, blocks, self._prefix)


def stored_heads(task: Distillation, prefixes: Mapping[str, int]) -> dict[str, StoredHead]:
    """Returns the heads of a task by their targets' labels; that of an only teacher is "teacher".

    Args:
        task: The task with the weights of a checkpoint.
        prefixes: Tokens before the patches of each teacher's map, by its name.
    """
    return {
        target.label or "teacher": StoredHead(target, prefixes[target.teacher])
        for target in task.targets
    }
