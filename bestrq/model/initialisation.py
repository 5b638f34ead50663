"""The weights that an encoder begins with.

With torch's own, whose biases are noise and whose residual branches are as large as they come, the frames of a deep
Conformer come out nearly alike: each block adds much that is the same for all frames, and its last norm shrinks what is
not. After 24 blocks a hundredth of the variance was between frames, and the encoder was slow to learn anything. So:

- the subsampling keeps the scale of its input (He et al., arXiv 1502.01852); torch's own would leave a tenth of it,
  which the first block's branches bury;
- biases begin at zero;
- the last map of each of the N residual branches begins at 1 / sqrt(N) of torch's weights (Radford et al., Language
  models are unsupervised multitask learners, 2019, section 2.3), so that what all of them add does not grow with depth.
"""

from collections.abc import Sequence

import torch
from torch import nn

BRANCHES = ("feedforward_in.out", "attention.out", "convolution.pointwise_out", "feedforward_out.out")
"""of a block: the last maps of its residual branches"""


def initialise_subsampling(subsampling: nn.Module) -> None:
    """Outputs of about the mean square of the inputs, where a ReLU follows all but depthwise maps and the last."""
    for name, module in subsampling.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rectified = not name.startswith("depthwise") and name != "out"
            scale_weights(module, 2.0 if rectified else 1.0)


def initialise_blocks(blocks: Sequence[nn.Module]) -> None:
    """Biases of zero, and residual branches that are small together. The norms stay as they are, at 1 and 0."""
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if name in BRANCHES:
                with torch.no_grad():
                    module.get_parameter("weight").mul_((len(BRANCHES) * len(blocks)) ** -0.5)
            if name == "shortcut" and isinstance(module, nn.Linear):
                scale_weights(module, 1.0)


def scale_weights(module: nn.Linear | nn.Conv2d, gain: float) -> None:
    """Normal weights of variance `gain / inputs of an output`, no bias."""
    nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
