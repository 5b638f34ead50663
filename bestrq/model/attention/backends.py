"""Choice of an attention backend, and its mask.

A backend maps concatenated queries, keys and values `[R, T, H + 2 * KV, d]` to `[R, T, H, d]`. It rotates queries and
keys by the rotary phase, scales scores by 1 / sqrt(d), then adds the learned bias, if any. Outputs at padding frames
are finite but unused. Each has a file of its own, which is imported only if used; `attention.module.ATTEND` lists them.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bestrq.model.attention.masks import BackendMask, Reach
from common.segments import Segments


def choose_backend(setting: str, device: torch.device, num_frames: int, reach: Reach, compiled: bool = False) -> str:
    """Choose the backend by `EncoderSettings.backend`, the device, the frames per row and the reach of the mask.

    Args:
        compiled: blocks are compiled on a CPU as well; a loop over the segments of a batch cannot be.
    """
    if device.type == "cpu" and not compiled:
        return "segments"
    # Compiled kernels do not run under a dispatch mode, such as torch's FLOP counter.
    kernels = ["flex", *(["varlen"] if torch.is_autocast_enabled(device.type) else [])]  # flash attention in bfloat16
    if setting in kernels and device.type != "cpu" and _get_current_dispatch_mode() is None:
        return setting
    before, after = reach
    return "dense" if before is None or after is None or 2 * (before + after) >= num_frames else "bands"


def make_backend_mask(
    backend: str,
    ordered: Segments,
    first_key: Tensor,
    stop_key: Tensor,
    reach: Reach,
    single_segment: Tensor | None = None,
) -> BackendMask:
    """Build the mask of a backend from the keys of every query, int64 `[R, T]`. All layers of a stage share it.

    Args:
        ordered: segments on the device, by their start, in frames of attention.
        single_segment: valid frames, bool `[R, T]`, if every row holds at most one segment; else None.
    """
    if backend == "dense":
        from bestrq.model.attention.dense import make_dense_mask, make_padding_mask

        if single_segment is not None and reach == (None, None):
            return make_padding_mask(single_segment)
        return make_dense_mask(first_key, stop_key)
    if backend == "bands":
        from bestrq.model.attention.bands import make_band_mask

        return make_band_mask(first_key, stop_key, reach)
    if backend == "flex":
        from bestrq.model.attention.flex import make_block_mask

        return make_block_mask(first_key, stop_key)
    if backend == "varlen":
        from bestrq.model.attention.varlen import make_boundaries

        return make_boundaries(ordered)
    return None
