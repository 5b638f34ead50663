"""Kernels of `torch.nn.attention.varlen` on a CPU, which torch lacks, by the documentation of that function."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen


def sequences(boundaries: Tensor) -> Iterator[slice]:
    for start, stop in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        yield slice(start, stop)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """`[N, KV, d] -> [H, N, d]`, shared heads repeated."""
    return x.transpose(0, 1).repeat_interleave(num_heads // x.shape[1], dim=0)


def weights(query: Tensor, key: Tensor, window: list[int], scale: float | None) -> tuple[Tensor, float]:
    """Attention weights of a sequence, `[H, N, N]`, and the scale of the scores."""
    num_frames, num_heads, width = query.shape
    before, after = (num_frames if side < 0 else side for side in window)
    scale = width**-0.5 if scale is None else scale
    frame = torch.arange(num_frames)
    distance = frame - frame[:, None]
    scores = scale * by_head(query, num_heads) @ by_head(key, num_heads).mT
    return scores.masked_fill((distance < -before) | (distance > after), -torch.inf).softmax(dim=-1), scale


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool, scale: float | None, window_size: list[int], *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch_attn::_varlen_attn`; its second and third results are only passed on to the backward pass."""
    lengths = cu_seq_q.diff()
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) and lengths.min() >= 0 and lengths.max() <= max_q == max_k
    assert is_causal == (window_size == [-1, 0])
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for part in sequences(cu_seq_q):
        attended = weights(query[part], key[part], window_size, scale)[0] @ by_head(value[part], query.shape[1])
        out[part] = attended.transpose(0, 1)
    return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor,
    cu_seq_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float | None,
    window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch_attn::_varlen_attn_backward`: derivatives of softmax and products (autograd is off in a kernel)."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for part in sequences(cu_seq_q):
        weight, used_scale = weights(query[part], key[part], window_size, scale)
        grad = by_head(grad_out[part], num_heads)
        of_weight = grad @ by_head(value[part], num_heads).mT
        of_score = used_scale * weight * (of_weight - (of_weight * weight).sum(dim=-1, keepdim=True))
        of_query = of_score @ by_head(key[part], num_heads)
        of_key, of_value = of_score.mT @ by_head(query[part], num_heads), weight.mT @ grad
        grads[0][part] = of_query.transpose(0, 1)
        for total, of_heads in zip(grads[1:], (of_key, of_value), strict=True):
            total[part] = of_heads.unflatten(0, (num_kv_heads, -1)).sum(dim=1).transpose(0, 1)
    return grads[0], grads[1], grads[2]


@contextmanager
def varlen_on_a_cpu() -> Iterator[None]:
    """Add the kernels for the time of the context."""
    assert torch_varlen.varlen_attn  # its import defines the operators
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield
