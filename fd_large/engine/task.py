"""What the engine trains: a Module that maps a batch to a loss and named metrics.

Distillation is one task; detection, segmentation and depth are others with the same face. The
engine knows nothing of teachers, heads or targets.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Task(nn.Module):
    """A trainable Module with a loss.

    Attributes:
        drop_path_rates: One rate per drop-path site of the task's network, in execution order; the
            engine draws `keep` of shape (num_sites, B) for them.
    """

    drop_path_rates: tuple[float, ...] = ()

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Does what needs no gradient of the trained parameters, a teacher's forward for example.

        Runs under no_grad and outside the engine, so that the engine sees one forward and one
        backward a micro batch.

        Args:
            images: (B, 3, H, W) uint8, on the device.
            targets: What the task's loader put beside them, on the device; None if nothing.
            keep: (num_sites, B) bool, or None for no drop path.

        Returns: the keyword arguments of `forward`.
        """
        raise NotImplementedError

    def forward(self, **prepared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, scalar float32, and detached scalar metrics by name."""
        raise NotImplementedError

    def nets(self) -> dict[str, nn.Module]:
        """Returns the Modules whose layers an incident is traced through, by prefix of names."""
        return {"": self}

    def layer_scale(self, name: str, decay: float) -> float:
        """Returns the factor of a parameter's learning rate under layer-wise decay; 1 for heads."""
        return 1.0

    def no_weight_decay(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Returns (parameter names, substrings of names) that are exempt from weight decay."""
        return frozenset(), ()
