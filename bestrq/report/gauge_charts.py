"""Charts of the gauge of pretraining targets. Each function returns a figure."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bestrq.report.chart_style import COLOURS, MUTED, STYLE, add_legend, line_style, new_figure, plain

Ints = NDArray[np.integer[Any]]
# Codes of a joint matrix: more would be thinner than a pixel.
_MAX_CODES = 400
# Multiplier of a code in its colour, so that neighbouring codes differ: the golden ratio (Knuth, volume 3, 6.4).
_GOLDEN = 0.6180339887


@dataclass(frozen=True)
class Example:
    """Recording with its phones and codes, for a picture."""

    name: str
    log_mel: NDArray[np.float32]
    """normalised, [F, M]"""
    hop_seconds: float
    phones: Sequence[tuple[str, float, float]]
    """symbol, start and end in seconds from the first frame; empty without phones"""
    codes: Mapping[str, Ints]
    """codes [T] of the first codebook by target"""
    frame_seconds: Mapping[str, float]
    """seconds per code by target"""


def example_chart(example: Example) -> Figure:
    """Spectrogram with phones, and a strip of codes over time per target; a colour stands for a code."""
    with rc_context(STYLE | {"axes.grid": False}):
        heights = [3.0, *([0.55] * len(example.codes))]
        figure = Figure(figsize=(9.6, sum(heights) * 0.62 + 0.9), dpi=150, layout="constrained")
        top, *strips = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        seconds = len(example.log_mel) * example.hop_seconds
        low, high = np.quantile(example.log_mel, [0.02, 0.995])
        top.imshow(
            example.log_mel.T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
            extent=(0, seconds, 0, example.log_mel.shape[1]), interpolation="nearest",
        )  # fmt: skip
        for number, (symbol, start, end) in enumerate(example.phones):
            top.axvline(start, color="white", linewidth=0.4, alpha=0.7)
            height = example.log_mel.shape[1] * (0.95 if number % 2 else 0.87)
            top.text((start + end) / 2, height, plain(symbol), color="white", fontsize=8, ha="center", va="center")
        top.set_ylabel("mel bin")
        top.set_title(plain(example.name), fontsize=10)
        for axes, (name, codes) in zip(strips, example.codes.items(), strict=True):
            colours = np.mod(codes * _GOLDEN, 1.0)
            axes.imshow(
                colours[None], aspect="auto", cmap="hsv", vmin=0, vmax=1, interpolation="nearest",
                extent=(0, len(codes) * example.frame_seconds[name], 0, 1),
            )  # fmt: skip
            axes.set_yticks([])
            axes.set_ylabel(plain(name, 24), rotation=0, ha="right", va="center", fontsize=8)
        (strips or [top])[-1].set_xlabel("seconds")
        top.set_xlim(0, seconds)
        return figure


def usage_chart(counts: Mapping[str, Ints]) -> Figure:
    """Share of every code of the first codebook by target, most frequent first, on logarithmic axes; counts `[V]`."""
    with rc_context(STYLE):
        figure, axes = new_figure(7.6, 3.8)
        for place, (name, row) in enumerate(counts.items()):
            share = np.sort(row)[::-1] / max(int(row.sum()), 1)
            used = share[share > 0]
            axes.plot(np.arange(1, len(used) + 1), used, **line_style(place), label=plain(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank of the code")
        axes.set_ylabel("share of frames")
        add_legend(axes)
        return figure


def information_chart(targets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Adjusted information on phones, phones in speech, speakers and languages by target, with 95 % intervals."""
    names = {
        "pnmi": "phones (PNMI)", "speech_pnmi": "phones without pauses", "speaker_nmi": "speakers",
        "language_nmi": "languages",
    }  # fmt: skip
    shown = {key: name for key, name in names.items() if any(f"{key}_adjusted" in row for row in targets.values())}
    with rc_context(STYLE | {"axes.grid.axis": "x", "hatch.linewidth": 0.7}):
        figure, axes = new_figure(7.6, 1.4 + 0.22 * len(targets) * max(len(shown), 1))
        height = 0.8 / max(len(shown), 1)
        for number, (key, name) in enumerate(shown.items()):
            rows = [(k, row) for k, row in enumerate(targets.values()) if f"{key}_adjusted" in row]
            places = np.array([k + (number - (len(shown) - 1) / 2) * height for k, _ in rows])
            middle = np.array([row[f"{key}_adjusted"] for _, row in rows])
            low = np.array([row[f"{key}_adjusted_low"] for _, row in rows])
            high = np.array([row[f"{key}_adjusted_high"] for _, row in rows])
            hatch = ("", "////", "....", "xxxx")[number]
            axes.barh(places, middle, height * 0.9, color=COLOURS[number], hatch=hatch, edgecolor="white", label=name)
            axes.hlines(places, low, high, color=MUTED, linewidth=1.4)
        axes.set_yticks(range(len(targets)))
        axes.set_yticklabels([plain(name, 30) for name in targets])
        axes.invert_yaxis()
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_xlabel("information of the code as a share of the entropy of the label, adjusted for chance")
        if shown:
            add_legend(axes, 4)
        return figure


def joint_chart(codes: Ints, phones: Ints, symbols: Sequence[str]) -> Figure:
    """Share of phones given the code, for the most frequent codes, sorted by their most probable phone.

    Args:
        codes: int `[N]`.
        phones: int `[N]`; negative numbers are left out.
        symbols: of the phones; an empty one is a pause.
    """
    known = phones >= 0
    codes, phones = codes[known], phones[known]
    frequent = np.argsort(-np.bincount(codes), kind="stable")[:_MAX_CODES]
    place = np.full(int(codes.max()) + 1, -1)
    place[frequent] = np.arange(len(frequent))
    kept = place[codes] >= 0
    joint = np.zeros((len(frequent), len(symbols)))
    np.add.at(joint, (place[codes[kept]], phones[kept]), 1)
    order = np.argsort(-np.bincount(phones, minlength=len(symbols)), kind="stable")
    joint = joint[joint.sum(axis=1) > 0][:, order]
    joint /= joint.sum(axis=1, keepdims=True)
    joint = joint[np.lexsort((-joint.max(axis=1), joint.argmax(axis=1)))]
    with rc_context(STYLE | {"axes.grid": False}):
        figure, axes = new_figure(7.6, 0.8 + 0.13 * max(len(symbols), 14))
        image = axes.imshow(joint.T, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_yticks(range(len(symbols)))
        axes.set_yticklabels([plain(symbols[k]) or "pause" for k in order], fontsize=7)
        axes.set_xlabel(f"{len(joint)} most frequent codes, sorted by their phone")
        figure.colorbar(image, ax=axes, label="share of the phone given the code")
        return figure


def png_bytes(figure: Figure) -> bytes:
    """Figure as PNG."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
