"""LARS, which moves every matrix by a fraction of its own norm, whatever its gradient's norm.

This file has the elementwise part of LARS, the momentum. `trust_ratio.py` scales the gradients
before they are added to the momentum.

Source: You et al., arXiv 1708.03888; class LARS of SwinTransformer/Feature-Distillation's utils.py,
which is that of MoCo v3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
TRUST_COEFFICIENT = 0.001


class Lars(torch.optim.Optimizer):
    """SGD with momentum on gradients that already include weight decay and trust ratio."""

    def __init__(self, groups: Any, lr: float) -> None:
        # The decay is part of the gradient that `trust_ratio.py` makes.
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Updates each parameter: m = MOMENTUM * m + gradient, then parameter -= lr * m.

        m is the parameter's momentum, which begins at 0; `closure` is ignored.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(parameter.grad)
                parameter.add_(momentum, alpha=-group["lr"])

    @staticmethod
    def trust_ratio(weight_norm: Tensor, gradient_norm: Tensor) -> Tensor:
        """Returns each gradient's factor, TRUST_COEFFICIENT * weight_norm / gradient_norm.

        The factor is 1 if a norm is 0. Both arguments hold L2 norms of the matrices, in the same
        shape; the gradients include weight decay.
        """
        ratio = TRUST_COEFFICIENT * weight_norm / gradient_norm
        return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
