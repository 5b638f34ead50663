"""Muon for the matrices of the Conformer blocks, AdamW for all other parameters.

Muon is momentum whose update is replaced by an approximately orthogonal matrix: all its singular values are near 1
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). The formulas and constants are those of
`torch.optim.Muon`, which is not used itself because it ignores `found_inf`, communicates at every matrix product of a
sharded parameter, and computes in bfloat16 on a CPU too.

By Jordan's rule Muon is for the hidden matrices of a network; its input and output layers, embeddings, biases and norms
have AdamW. Here the hidden matrices are those of the linear layers of the blocks, pointwise convolutions included.
AdamW has the depthwise convolutions, whose filters do not mix channels, the table of relative positions, and everything
outside of the blocks: subsampling, heads, prediction network. The projections of queries, keys and values are stored as
one matrix and orthogonalised one by one (same source).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bestrq.training.process import local, unsharded
from common.errors import UserError

MOMENTUM = 0.95
"""of Nesterov's momentum (Jordan et al. 2024; Moonlight, arXiv 2502.16982)"""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""quintic Newton-Schulz iterations and their polynomial's coefficients (Jordan et al. 2024)"""
UPDATE_RMS = 0.2
"""root mean square of an update relative to the learning rate: about AdamW's, so that both share rates and weight decay
(Liu et al., arXiv 2502.16982, section 2.2)"""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains the parameter of this name in the model."""
    return parameter.ndim == 2 and ".blocks." in f".{name}" and not name.endswith("relative_bias.weight")


class Muon(torch.optim.Optimizer):
    """Both optimizers as one, with one state and with groups in the given order.

    A step with a nonzero `found_inf` changes neither parameters nor state; the host does not read it. Under FSDP2 the
    matrices are gathered one at a time, orthogonalised on every rank, and each rank updates its shard.

    Args:
        param_groups: of `build_optimizer`, with `names` for `params`.
    """

    found_inf: Tensor | None = None

    def __init__(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        groups = [part for group in param_groups for part in _split(group)]
        if not any(group["is_muon"] for group in groups):
            raise UserError("optimizer.name is 'muon', but no matrix of an encoder block is trained: give 'adamw'")
        super().__init__(groups, {})
        # The same dictionaries: AdamW reads the rates that are set in the groups of this optimizer.
        others = [group for group in self.param_groups if not group["is_muon"]]
        self._adamw = torch.optim.AdamW(others, fused=True) if others else None
        if self._adamw is not None:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self._adamw is not None:
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True) if group["is_muon"] else ():
                if parameter.grad is not None:
                    self._update(name, parameter, group)

    def _update(self, name: str, parameter: Any, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # 0-d factors on the device: 1, or 0 in a skipped step, whose gradient is set to 0 because 0 * NaN is NaN.
        weight, grad, momentum = local(parameter), local(gradient), local(state["momentum_buffer"])
        skipped = torch.zeros((), device=weight.device) if self.found_inf is None else self.found_inf
        applied = (skipped == 0).to(weight.dtype)
        grad.masked_fill_(skipped != 0, 0.0)
        momentum.lerp_(grad, (1 - MOMENTUM) * applied)
        grad.lerp_(momentum, MOMENTUM)
        whole = unsharded(gradient)
        direction = torch.cat([_scaled_direction(part) for part in whole.split(_parts(name, whole))])
        if hasattr(parameter, "device_mesh"):  # every rank has the whole matrix and keeps its shard
            from torch.distributed.tensor import distribute_tensor  # only for FSDP2

            mesh, placements = parameter.device_mesh, parameter.placements
            direction = distribute_tensor(direction, mesh, placements, src_data_rank=None).to_local()
        rate = applied * (group["lr"] * group["settings"].muon_rate)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.sub_(direction.mul_(rate))


def _split(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of Muon's and of AdamW's parameters; empty ones are left out."""
    named = list(zip(group["names"], group["params"], strict=True))
    parts = []
    for is_muon in (True, False):
        if chosen := [item for item in named if is_hidden_matrix(*item) == is_muon]:
            names, parameters = ([item[i] for item in chosen] for i in (0, 1))
            parts.append({**group, "names": names, "params": parameters, "is_muon": is_muon})
    return parts


def _parts(name: str, matrix: Tensor) -> list[int]:
    """Rows of the matrices stored in one: queries, keys and values, of which keys and values may have fewer heads."""
    rows, columns = matrix.shape
    if not name.endswith("attention.qkv.weight"):
        return [rows]
    return [columns, (rows - columns) // 2, (rows - columns) // 2]


def _scaled_direction(matrix: Tensor) -> Tensor:
    """Orthogonalised matrix with entries of root mean square of about `UPDATE_RMS`.

    An orthogonal matrix `[A, B]` has a root mean square of 1 / sqrt(max(A, B)). Matrix products are in bfloat16 on
    CUDA, as in `torch.optim.Muon`; CPUs are faster in float32.
    """
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    return orthogonalise(matrix.to(dtype)).to(matrix.dtype) * (UPDATE_RMS * max(matrix.shape) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Replace the singular values of `[A, B]` by values between about 0.7 and 1.2 (zeros stay), in its dtype."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
