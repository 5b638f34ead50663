"""Model FLOPs: what the arithmetic of a step costs at least, whatever the implementation does besides."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a forward and backward pass of `loss()`.

    Counted once on a small input before training: under the counter every operator takes a detour through Python.
    Gradients are cleared afterwards.
    """
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()
