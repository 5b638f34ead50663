"""Log-mel as a model sees it: zero mean and unit variance of every bin, over a recording or over a dataset."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

# A bin whose values hardly differ (silence, a band that telephone speech lacks) is centred, not blown up.
SMALLEST_STD = 0.01


def scale_of(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics, float32 [M] each, as `normalise_into` takes them: (mean, 1 / std)."""
    return mean, std.clamp(min=SMALLEST_STD).reciprocal_()


def normalise_into(out: Tensor, values: np.ndarray, mean: Tensor, inverse_std: Tensor) -> None:
    """Normalise float16 [n, M] into contiguous float32 [n, M]. Raises UserError for NaN and infinite values."""
    # torch converts float16 nine times as fast as numpy.
    out.copy_(torch.from_numpy(values)).sub_(mean).mul_(inverse_std)
    # The quickest pass that any NaN or infinity survives; normalised float16 cannot overflow it otherwise.
    if not math.isfinite(out.sum()):
        raise UserError("NaN or infinite values")
