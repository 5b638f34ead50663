"""The one place where norms are made."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # NVIDIA's Apex, which is not on PyPI; the package of that name there has no such module.
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine
except ImportError:
    fused_layer_norm_affine = None


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, by Apex's fused kernel where there is one and the input is on CUDA.

    Parameters are `weight` and `bias` either way, so a checkpoint does not know which was used.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fused_layer_norm_affine is not None and x.is_cuda:
            with torch.autocast("cuda", enabled=False):
                weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
                return fused_layer_norm_affine(x, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def make_norm(kind: str, dim: int) -> nn.Module:
    """The norm that `EncoderSettings.norm` names, over `dim` features."""
    if kind != "layer_norm":
        raise ValueError(f"norm {kind!r}: give 'layer_norm'")
    return LayerNorm(dim)
