"""Charts of docs/bestrq.md, drawn from the numbers of experiments/bestrq_figures.py, and the settings of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from bestrq.pretraining.mask_shares import masked_share, segment_share
from bestrq.pretraining.masking import draw_span_mask, fill_with_noise
from bestrq.pretraining.objective import target_frame_mask
from bestrq.pretraining.quantizer import RandomProjectionQuantizer, stack_frames
from bestrq.report.chart_style import COLOURS, STYLE, add_legend, line_style, new_figure
from common.segments import Segments

STRIDE = 4
SPAN, START = 40, 0.01
"""span in mel frames and start probability of the paper (arXiv 2202.01855, section 4.1)"""
SPANS = (16, 40, 80)
STARTS = (0.0025, 0.005, 0.01, 0.0125, 0.02, 0.03, 0.04)
STRIDES = (1, 2, 4, 8, 16)
CODEBOOK_SIZES = (64, 256, 1024, 4096, 8192)
CODEBOOK_DIMS = (2, 4, 8, 16, 64)


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """Counts of the codes of one codebook, int64 `[V]`."""
    return torch.bincount(codes.flatten(), minlength=codebook_size)


def measured_mask(frames: int, span: int, start: float, seed: int) -> Tensor:
    """Mask of one long segment, bool `[1, frames]`."""
    return torch.from_numpy(draw_span_mask(np.random.default_rng(seed), frames, span, start))[None]


def one_segment(frames: int) -> Segments:
    """Segments of a row that is one segment with seed 1."""
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return Segments(zero, zero + frames, frames, zero + 1)


def draw_example(features: Tensor, quantizer: RandomProjectionQuantizer, hop_ms: float) -> Figure:
    """Clean log-mel, input of the encoder, and codes with the targets marked, of a segment `[F, M]`."""
    frames = len(features)
    mask = measured_mask(frames, SPAN, START, seed=4)
    segments = one_segment(frames)
    noisy = fill_with_noise(features[None], mask, segments, 0.1)[0]
    codes = quantizer(stack_frames(features[None], STRIDE)[0])[:, 0]
    targets = target_frame_mask(mask, segments, STRIDE)[0].numpy()
    seconds = frames * hop_ms / 1000
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9.6, 5.2), dpi=100, layout="constrained")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
        extent = (0, seconds, 0, features.shape[1])
        for place, image, title in ((0, features, "clean, normalised log-mel"), (1, noisy, "input of the encoder")):
            axes[place].imshow(
                image.T.numpy(), origin="lower", aspect="auto", extent=extent, interpolation="none", vmin=-2, vmax=3
            )
            axes[place].set(ylabel="mel bin", title=title)
        time = np.arange(len(codes)) * STRIDE * hop_ms / 1000
        for chosen, colour, label in ((~targets, COLOURS[5], "code"), (targets, COLOURS[1], "code that is a target")):
            axes[2].plot(time[chosen], codes.numpy()[chosen], ".", color=colour, markersize=4, label=label)
        axes[2].set(xlabel="seconds", ylabel="code", xlim=(0, seconds))
        axes[2].legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2, fontsize=8)
    return figure


def draw_usage(codes: dict[str, Tensor], figures: dict[str, Any], codebook_size: int) -> Figure:
    """Share of every code, most frequent first."""
    with rc_context(STYLE):
        figure, axes = new_figure(7.2, 3.8)
        for place, (name, values) in enumerate(codes.items()):
            share = code_counts(values, codebook_size).double().sort(descending=True).values
            share = share[share > 0] / share.sum()
            label = f"{name}: perplexity {figures[name]['perplexity']:,.0f}"
            axes.plot(np.arange(1, len(share) + 1), share.numpy(), label=label, **line_style(place))
        axes.set(xscale="log", yscale="log", xlabel="code, most frequent first", ylabel="share of the stacks")
        add_legend(axes, columns=1)
    return figure


def draw_mask_shares(rows: Sequence[dict[str, float]]) -> Figure:
    """Share of masked frames against the start probability, and against the length of the segment."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        grid = np.linspace(0, max(STARTS), 100)
        for place, span in enumerate(SPANS):
            chosen = [row for row in rows if row["span"] == span]
            left.plot(grid, [masked_share(p, span) for p in grid], **line_style(place), label=f"{span * 10} ms")
            left.plot([r["start"] for r in chosen], [r["share"] for r in chosen], "o", color=COLOURS[place])
            lengths = np.arange(10, 1500, 10)
            start = 1 - (1 - masked_share(START, SPAN)) ** (1 / span)
            right.plot(lengths / 100, [segment_share(int(n), start, span) for n in lengths], **line_style(place))
        left.set(xlabel="start probability per mel frame", ylabel="share of masked frames", ylim=(0, 1))
        left.legend(title="span; points: measured", fontsize=8.5, title_fontsize=8.5)
        right.set(xlabel="seconds of the segment", ylabel="share of masked frames", ylim=(0, 0.4))
    return figure


def draw_targets(rows: Sequence[dict[str, float]]) -> Figure:
    """Share of encoder frames with a target against the stride."""
    with rc_context(STYLE):
        figure, axes = new_figure(5.4, 3.2)
        for place, span in enumerate(SPANS):
            chosen = [row for row in rows if row["span"] == span]
            strides = [row["stride"] for row in chosen]
            axes.plot(strides, [r["share_formula"] for r in chosen], **line_style(place), label=f"span {span * 10} ms")
            axes.plot(strides, [r["share"] for r in chosen], "o", color=COLOURS[place])
        axes.set(xscale="log", xlabel="stride in mel frames", ylabel="share of frames with a target", ylim=(0, 0.36))
        axes.set_xticks(STRIDES, [str(stride) for stride in STRIDES])
        axes.minorticks_off()
        axes.legend(title="formula; points: measured", fontsize=8.5, title_fontsize=8.5)
    return figure


def draw_entropy(rows: Sequence[dict[str, float]]) -> Figure:
    """Entropy of the codes against the size of the codebook, by dimension."""
    with rc_context(STYLE):
        figure, axes = new_figure(5.4, 3.6)
        for place, dim in enumerate(CODEBOOK_DIMS):
            chosen = [row for row in rows if row["dim"] == dim]
            sizes = [row["size"] for row in chosen]
            axes.plot(sizes, [r["entropy"] for r in chosen], **line_style(place), label=f"{dim} dimensions")
        axes.plot(CODEBOOK_SIZES, np.log(CODEBOOK_SIZES), color="#9aa4af", linewidth=1, label="log of the size")
        axes.set(xscale="log", xlabel="codes in the codebook", ylabel="entropy of the codes, nats")
        axes.set_xticks(CODEBOOK_SIZES, [f"{size:,}" for size in CODEBOOK_SIZES])
        axes.minorticks_off()
        axes.legend(fontsize=8.5)
    return figure


def draw_runs(runs: dict[str, np.ndarray], frames: int, hop_ms: float) -> Figure:
    """Distribution of the lengths of masked runs, and of runs of equal codes."""
    mask = measured_mask(frames, SPAN, START, seed=SPAN)[0].numpy()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    masked = edges[1::2] - edges[::2]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.hist(masked * hop_ms, bins=np.arange(0, 1600, 20).tolist(), density=True, color=COLOURS[0])
        left.set(xlabel="length of a masked run, ms", ylabel="density", title=f"spans of {SPAN * hop_ms:g} ms")
        for place, (name, lengths) in enumerate(runs.items()):
            share = [float(lengths[lengths >= n].sum() / lengths.sum()) for n in range(1, 13)]
            right.plot(range(1, 13), share, **line_style(place), marker="o", markersize=3, label=name)
        right.set(
            xlabel="length of a run of equal codes, stacks",
            ylabel="share of the stacks",
            title="in runs of this length or longer",
        )
        right.legend(fontsize=8.5)
    return figure
