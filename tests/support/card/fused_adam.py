"""DeepSpeed's FusedAdam without a GPU: its own Python, and its kernel's arithmetic in torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor


def install(patch: pytest.MonkeyPatch, *, wrong: float = 1.0) -> list[int]:
    """Lets DeepSpeed's builder of FusedAdam load a stand-in.

    Args:
        patch: Takes it away again.
        wrong: Factor of the step that the kernel takes; 1 is right.

    Returns: the step count of each launch, as they come.
    """
    # Here, because deepspeed's import takes seconds.
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import FusedAdamBuilder

    launched: list[int] = []

    def multi_tensor_adam(
        chunk_size: int,
        overflow: Tensor,
        lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        adam_w_mode: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        assert adam_w_mode
        assert bias_correction
        launched.append(step)
        for gradient, parameter, moment, square in zip(*lists, strict=True):
            moment.mul_(beta1).add_(gradient, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            change = (moment / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
            parameter.sub_(wrong * lr * (change + weight_decay * parameter))

    def load(builder: Any, verbose: bool = False) -> SimpleNamespace:
        return SimpleNamespace(multi_tensor_adam=multi_tensor_adam)

    patch.setattr(FusedAdamBuilder, "load", load)
    # As in an image that was built with it.
    patch.setitem(installed_ops, "fused_adam", True)
    return launched
