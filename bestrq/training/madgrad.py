"""MADGRAD: momentum, AdaGrad with cube roots, and dual averaging (Defazio and Jelassi, arXiv 2101.11075, algorithm 1).

The optimizer of the long-context experiments of Flynn and Ragni (arXiv 2310.15672), with a rate of 2e-3. Rates are not
those of AdamW: the authors of MADGRAD recommend a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bestrq.training.process import local


class Madgrad(torch.optim.Optimizer):
    """MADGRAD, elementwise, with step counter k (from 0), gradient g, rate r, initial weight x0 and c = 1 - `betas[0]`:

        l = r * sqrt(k + 1);  s += l * g;  v += l * g^2;  z = x0 - s / (cbrt(v) + eps);  x = (1 - c) * x + c * z

    Weight decay is the paper's L2 penalty, added to the gradient: decoupled decay of x would be undone by the pull
    towards z. The authors recommend less than for other optimizers, often 0. A step with a nonzero `found_inf` changes
    neither parameters nor state; the host does not read it.

    State of a parameter: `step` (k, 0-d), `gradient_sum` (s), `square_sum` (v), `start` (x0): 12 bytes per weight,
    against 8 of AdamW. Under FSDP2 each rank updates its shard.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["gradient_sum"], state["square_sum"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["start"] = parameter.detach().clone()
        assert parameter.grad is not None
        weight, grad = local(parameter), local(parameter.grad)
        gradient_sum, square_sum, start = (local(state[key]) for key in ("gradient_sum", "square_sum", "start"))
        skipped = torch.zeros((), device=weight.device) if self.found_inf is None else self.found_inf
        applied = (skipped == 0).to(weight.dtype)
        if group["weight_decay"]:
            grad = grad.add(weight, alpha=group["weight_decay"])
        grad = grad.masked_fill(skipped != 0, 0.0)  # the sums do not change
        rate = group["lr"] * (state["step"] + 1).sqrt()
        gradient_sum.addcmul_(grad, rate)
        square_sum.addcmul_(grad.square(), rate)
        target = torch.addcdiv(start, gradient_sum, square_sum.pow(1 / 3).add_(group["eps"]), value=-1)
        weight.lerp_(target, (1 - group["betas"][0]) * applied)
        state["step"] += applied
