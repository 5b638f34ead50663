"""Which way attention is reckoned: chosen once a batch, when its rows are laid out.

All of them take joint queries, keys and values `[R, T, H + 2 * KV, d]` and give `[R, T, H, d]`; what they give for
frames of a gap means nothing, but is finite. Queries, keys and values are turned by the rotary phase, scores are
scaled by 1 / sqrt(d), then a learned bias is added where there is one.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bestrq.model.attention.flex import make_block_mask
from bestrq.model.attention.sdpa import make_band_mask, make_dense_mask, make_padding_mask

Plan = Tensor | BlockMask | None
Reach = tuple[int | None, int | None]

BACKENDS = ("segments", "dense", "bands", "flex", "reference")


def choose_backend(setting: str, device: torch.device, num_frames: int, reach: Reach) -> str:
    """The one place that chooses: by `EncoderSettings.backend`, the device, and how far frames see.

    Args:
        num_frames: frames T in a row.
        reach: frames seen before and behind; None without bound.
    """
    if device.type == "cpu":
        return "segments"
    # Under a mode that looks at every operation (torch's counter of FLOPs), compiled kernels do not run.
    if setting == "flex" and _get_current_dispatch_mode() is None:
        return "flex"
    before, behind = reach
    return "dense" if before is None or behind is None or 2 * (before + behind) >= num_frames else "bands"


def make_plan(
    backend: str, first_key: Tensor, stop_key: Tensor, reach: Reach, only_segment: Tensor | None = None
) -> Plan:
    """What `backend` needs to know of a batch, shared by all layers.

    Args:
        first_key, stop_key: int64 `[R, T]`: the interval of frames of its row that a frame attends to.
        only_segment: bool `[R, T]`, the frames of the one segment that a row may hold, where rows hold no more; else
            None.
    """
    if backend == "dense":
        if only_segment is not None and reach == (None, None):
            return make_padding_mask(only_segment)
        return make_dense_mask(first_key, stop_key)
    if backend == "bands":
        before, behind = reach
        if before is None or behind is None:
            raise ValueError(f"backend 'bands' with a reach of {reach}: it needs a bounded one")
        return make_band_mask(first_key, stop_key, before, behind)
    if backend == "flex":
        return make_block_mask(first_key, stop_key)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: give one of {', '.join(BACKENDS)}")
    return None
