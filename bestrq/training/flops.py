"""Model FLOPs: what the arithmetic of a step costs at least, whatever the implementation does besides."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a forward and backward pass of `loss()`.

    Three times those of the forward pass: each product has two of its size in the backward. The backward itself is
    not counted, since torch's counter takes a depthwise convolution's weight gradient for a dense one. Called once on
    a small input before training: under the counter every operator takes a detour through Python.
    """
    with FlopCounterMode(display=False) as counter:
        loss()
    return 3 * counter.get_total_flops()
