"""Closed forms for span masks: shares of masked frames and of targets, and the length of masked runs.

Every mel frame starts a span of `span` frames with probability p, independently; spans may overlap
(`masking.draw_span_mask`). A frame is unmasked if none of the last `span` frames starts a span, hence q = (1 - p)^span.
Derivations: docs/bestrq.md. Except for `segment_share`, the formulas hold far from both ends of a segment, that is for
segments much longer than a span.
"""

import numpy as np


def masked_share(start_probability: float, span: int) -> float:
    """Share of masked mel frames, 1 - (1 - p)^span; spans are in mel frames."""
    return 1 - (1 - start_probability) ** span


def target_share(start_probability: float, span: int, stride: int) -> float:
    """Share of encoder frames whose `stride` mel frames are all masked, 1 - (1 - p)^span (1 + (stride - 1) p).

    The stack has an unmasked frame if and only if `span` consecutive frames without a start end in it; if stride - 1 is
    at most `span`, there is at most one such run of maximal length.

    Raises:
        ValueError: the stride exceeds the span by more than one frame.
    """
    if stride - 1 > span:
        raise ValueError(f"stride is {stride}, span {span}: the formula needs a stride of at most span + 1")
    return 1 - (1 - start_probability) ** span * (1 + (stride - 1) * start_probability)


def mean_run(start_probability: float, span: int) -> float:
    """Mean length of a run of masked frames, in mel frames: masked share divided by the rate of run starts, p q."""
    unmasked = (1 - start_probability) ** span
    return (1 - unmasked) / (start_probability * unmasked)


def segment_share(frames: int, start_probability: float, span: int) -> float:
    """Share of masked mel frames of a segment of `frames`, with its edges: spans are never truncated.

    Frame i is covered by the spans that start in [max(0, i - span + 1), min(i, frames - span)].
    """
    if frames < span:
        return 0.0
    i = np.arange(frames)
    covering = np.minimum(i, frames - span) - np.maximum(i - span + 1, 0) + 1
    return float((1 - (1 - start_probability) ** covering).mean())
