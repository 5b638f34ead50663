"""Reference attention by definition, in float64. Importing this module adds the backend 'reference'.

Source: Vaswani et al., arXiv 1706.03762, section 3.2.1.
"""

import torch
from torch import Tensor

from bestrq.model.attention.draw_mask import dense_mask
from bestrq.model.attention.masks import AttentionLayout
from bestrq.model.attention.module import ATTEND


def attend_reference(
    qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention of one segment and one head at a time, `[R, T, H + 2 * KV, d] -> [R, T, H, d]`; zero in gaps.

    Softmax of scaled, biased scores over the allowed keys, times values. Differentiable, in plain torch operations.
    """
    assert dropout == 0.0
    out = torch.zeros_like(qkv[:, :, :num_heads]).flatten(0, 1)
    phases = None if layout.rotary_phase is None else torch.view_as_complex(layout.rotary_phase).flatten(0, 1)
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    for start, stop in layout.segments:
        segment = qkv.flatten(0, 1)[start:stop].double()
        q, k, v = segment.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if phases is not None:
            phase = phases[start:stop, None].to(torch.complex128)
            q, k = (
                torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * phase).flatten(-2)
                for x in (q, k)
            )
        allowed = dense_mask(layout.mask, stop - start)
        heads = []
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / qkv.shape[-1] ** 0.5
            if bias is not None:
                frame, reach = torch.arange(stop - start), bias.shape[1] // 2
                scores = scores + bias[head].double()[(frame - frame[:, None]).clamp(-reach, reach) + reach]
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
            heads.append(weights @ v[:, kv_head])
        out = out.index_copy(0, torch.arange(start, stop), torch.stack(heads, dim=1).to(out.dtype))
    return out.unflatten(0, qkv.shape[:2])


ATTEND["reference"] = attend_reference
