"""LayerNorm and RMSNorm, by Apex if it is installed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # NVIDIA's Apex is not on PyPI; the package of that name there lacks this module.
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine
except ImportError:
    fused_layer_norm_affine = fused_rms_norm_affine = None

EPS = 1e-5
"""added to the variance (in RMSNorm, the mean square) before the square root"""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, with Apex's fused kernel if installed and the input is on CUDA.

    Parameters are `weight` and `bias` in both cases, so checkpoints do not depend on the kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fused_layer_norm_affine is not None and x.is_cuda and not torch.compiler.is_compiling():
            with torch.autocast("cuda", enabled=False):
                weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
                return fused_layer_norm_affine(x, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension, with a `weight` only; uses Apex as `LayerNorm` does.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # torch has a fused kernel for equal dtypes only
        if fused_rms_norm_affine is not None and x.is_cuda and not torch.compiler.is_compiling():
            with torch.autocast("cuda", enabled=False):
                return fused_rms_norm_affine(x, weight, self.normalized_shape, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(kind: str, dim: int) -> nn.Module:
    """Build the norm of `EncoderSettings.convolution_norm` over the last dimension of `[..., dim]`."""
    if kind == "layer_norm":
        return LayerNorm(dim, eps=EPS)
    if kind == "rms_norm":
        return RMSNorm(dim, eps=EPS)
    if kind == "batch_norm":
        from bestrq.model.batch_norm import MaskedBatchNorm  # imported only if used

        return MaskedBatchNorm(dim, eps=EPS)
    raise ValueError(f"norm {kind!r}: give 'layer_norm', 'rms_norm' or 'batch_norm'")
