"""An optimiser of the user's own: --optim.name module:lion.py:Lion.

Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
"""

import torch


class Lion(torch.optim.Optimizer):
    """Steps by the sign of a momentum, element by element."""

    def __init__(self, groups, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Steps each parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                momentum = state["exp_avg"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                sign = momentum.lerp(weight.grad, 1 - beta1).sign_()
                weight.add_(sign, alpha=-group["lr"])
                momentum.lerp_(weight.grad, 1 - beta2)
