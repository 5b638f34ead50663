"""Weighted sum of the outputs of all blocks, as the output of the encoder (`EncoderSettings.output`).

Source: Yang et al., "SUPERB: Speech processing Universal PERformance Benchmark", arXiv 2105.01051: the weights are
learned with the head. As in s3prl's option `normalize`, every output is normalised by a layer norm without
parameters, so that a weight does not depend on the scale of its block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bestrq.model.norms import EPS


class LayerSum(nn.Module):
    """Softmax weights of the blocks, equal at first; `weight` holds their logits, float32 `[num_layers]`."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        """Term of a layer in the sum: its output `[R, T, D]`, normalised and weighted; the dtype is kept.

        The normalised output is computed again in the backward pass, so that only the output itself is stored.
        """
        if not torch.is_grad_enabled():
            return self._term(x, layer)
        return checkpoint(self._term, x, layer, use_reentrant=False, preserve_rng_state=False)

    def _term(self, x: Tensor, layer: int) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=EPS).to(x.dtype) * self.weight.softmax(dim=0)[layer].to(x.dtype)
