"""Pictures of results: error rates against context, by part of the recordings, and differences between systems.

Rates come in as shares and are drawn in percent. Lines differ in dash and mark as well as in colour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bestrq.report.drawing import (
    COLOURS,
    MARKERS,
    MUTED,
    STYLE,
    add_legend,
    line_style,
    new_figure,
    plain,
    svg_image,
    svg_text,
)


@dataclass(frozen=True)
class Point:
    """An error rate and what it belongs to."""

    context_seconds: float
    """what a frame can see; 0 for the whole recording"""
    rate: float
    interval: tuple[float, float] | None
    """95 %"""
    system: str = ""
    """the evaluation it comes from"""

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bin:
    """An error rate of a part of the recordings; None where nothing was said there."""

    rate: float | None
    interval: tuple[float, float] | None


def context_chart(lines: Mapping[str, Sequence[Point]], y_label: str) -> str:
    """`context_figure` as an image."""
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{100 * one.rate:.1f} % at {context_name(one.context_seconds)}" for one in points)
        for name, points in lines.items()
    )
    return svg_image(context_figure(lines, y_label), f"{y_label} against context. {alt}", wide=True)


def context_svg(lines: Mapping[str, Sequence[Point]], y_label: str) -> str:
    """`context_figure` as the text of a file."""
    return svg_text(context_figure(lines, y_label)) + "\n"


def context_figure(lines: Mapping[str, Sequence[Point]], y_label: str) -> Figure:
    """Rates against context on a logarithmic axis with 95 % bands; whole recordings stand at the right end.

    Args:
        lines: points by name, sorted by context with the whole recording last.
    """
    finite = sorted({one.context_seconds for points in lines.values() for one in points if one.context_seconds})
    has_whole = any(not one.context_seconds for points in lines.values() for one in points)
    # Half as far again as the axis has between two ticks, so that the gap in the axis shows.
    end = finite[-1] * max(2.0, (finite[-1] / finite[0]) ** 0.18) if finite else 1.0
    with rc_context(STYLE):
        figure, axes = new_figure(7.6, 4.0)
        band = 0.13 if len(lines) <= 3 else 0.0  # many on top of each other hide the lines
        for place, (name, points) in enumerate(lines.items()):
            x = np.array([one.context_seconds or end for one in points])
            y = 100 * np.array([one.rate for one in points])
            # Bands of several lines hide each other, bars a little beside each other do not; so both, thinly.
            x = x * 1.012 ** (place - (len(lines) - 1) / 2)
            style = line_style(place)
            axes.plot(x, y, **style, marker=MARKERS[place % 7], markersize=6, label=plain(name))
            known = [k for k, one in enumerate(points) if one.interval is not None]
            if known:
                low, high = 100 * np.array([points[k].interval for k in known], dtype=np.float64).T
                axes.fill_between(x[known], low, high, color=style["color"], alpha=band, linewidth=0)
                axes.vlines(x[known], low, high, color=style["color"], linewidth=1.2, alpha=0.8)
        axes.set_xscale("log")
        axes.set_xticks([*finite, *([end] if has_whole else [])])
        axes.set_xticklabels([*(f"{one:g}" for one in finite), *(["whole"] if has_whole else [])])
        axes.xaxis.set_minor_locator(NullLocator())
        if has_whole and finite:
            axes.axvline((finite[-1] * end) ** 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.set_xlabel("context, seconds")
        axes.set_ylabel(f"{y_label}, %")
        _from_zero(axes)
        if len(lines) > 1:
            add_legend(axes)
        return figure


def bins_chart(title: str, names: Sequence[str], bins: Mapping[str, Sequence[Bin]], x_label: str) -> str:
    """WER of parts of the recordings, in their order, with 95 % intervals, as SVG.

    Args:
        names: of the parts, `[n]`.
        bins: by system, `[n]` each.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(4.9, 3.2)
        for place, (name, parts) in enumerate(bins.items()):
            known = [k for k, part in enumerate(parts) if part.rate is not None]
            x = np.array(known) + 0.12 * (place - (len(bins) - 1) / 2)
            style = line_style(place)
            axes.plot(x, [100 * (parts[k].rate or 0.0) for k in known], **style, marker=MARKERS[place % 7],
                      markersize=4.5, label=plain(name))  # fmt: skip
            hollow = [n for n, k in enumerate(known) if parts[k].interval is None]
            unsure = [100 * (parts[known[n]].rate or 0.0) for n in hollow]
            axes.plot(x[hollow], unsure, linestyle="", marker=MARKERS[place % 7], markersize=4.5, color=style["color"],
                      markerfacecolor="white", zorder=3)  # fmt: skip
            for at, k in zip(x, known, strict=True):
                if (bounds := parts[k].interval) is not None:
                    axes.vlines(at, 100 * bounds[0], 100 * bounds[1], color=style["color"], linewidth=1.4, alpha=0.75)
        axes.set_xticks(range(len(names)))
        turn: dict[str, Any] = {"rotation": 35, "ha": "right"} if sum(map(len, names)) > 44 else {}
        axes.set_xticklabels([plain(one) for one in names], **turn)
        axes.set_xlabel(x_label)
        axes.set_ylabel("WER, %")
        axes.margins(x=0.04)
        _from_zero(axes)
        if len(bins) > 1:
            add_legend(axes)
        rates = "; ".join(
            f"{name}: " + ", ".join("-" if part.rate is None else f"{100 * part.rate:.1f}" for part in parts)
            for name, parts in bins.items()
        )
        return svg_image(figure, f"{title}. WER in % of {', '.join(names)}: {rates}")


def differences_chart(title: str, differences: Sequence[float], y_label: str) -> str:
    """Differences between two systems on every recording, sorted, as SVG: bars below zero are better."""
    values = 100 * np.sort(np.asarray(differences, dtype=np.float64))
    better, worse = int((values < 0).sum()), int((values > 0).sum())
    with rc_context(STYLE | {"hatch.linewidth": 0.7}):
        figure, axes = new_figure(4.9, 3.2)
        places = np.arange(len(values))
        width = 0.85 if len(values) <= 60 else 1.0
        for mine, colour, hatch, name in (
            (values <= 0, COLOURS[0], "", f"better on {better:,}"),
            (values > 0, COLOURS[1], "////", f"worse on {worse:,}"),
        ):
            axes.bar(places[mine], values[mine], width, color=colour, hatch=hatch, edgecolor="white",
                     linewidth=0.5 if len(values) <= 60 else 0.0, label=name)  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=0.9)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(values):,} recordings, sorted")
        axes.set_ylabel(y_label)
        add_legend(axes)
        return svg_image(figure, f"{title}: better on {better}, worse on {worse} of {len(values)} recordings")


def context_name(seconds: float) -> str:
    """A context as text."""
    return f"{seconds:g} s" if seconds else "whole recordings"


def _from_zero(axes: Axes) -> None:
    """Down to zero where that costs less than half of the picture: differences are not blown up without need."""
    low, high = axes.get_ylim()
    if low < 0.55 * high:
        axes.set_ylim(bottom=0)
