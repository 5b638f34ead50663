"""Charts of a report: training curves, pretraining pictures and evaluation results.

Each function returns one `<img>` with its data inside. Lines differ in dash and marker as well as in colour, so a chart
is readable without colours. Error rates are passed as shares and drawn in percent.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from bestrq.report.chart_style import (
    COLOURS,
    MARKERS,
    MUTED,
    STYLE,
    add_legend,
    image,
    line_style,
    new_figure,
    plain,
    svg_image,
    svg_text,
)
from bestrq.report.comparison import Point, context_name


@dataclass(frozen=True)
class Series:
    """Values over steps; both `[n]`."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Bin:
    """Error rate of a part of the recordings; None if the part has no reference words."""

    rate: float | None
    interval: tuple[float, float] | None


def line_chart(title: str, series: Mapping[str, Series], y_label: str, from_zero: bool = False) -> Markup:
    """Named lines over optimizer steps, as SVG. Short series are drawn with dots."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        for place, (name, line) in enumerate(series.items()):
            short = len(line.steps) <= 12
            axes.plot(
                line.steps, line.values, **line_style(place), label=plain(name), marker="o" if short else None,
                markersize=4,
            )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel(plain(y_label))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
        if len(series) > 1:
            add_legend(axes)
        last = "; ".join(f"{name}: {line.values[-1]:.4g} at {line.steps[-1]:g}" for name, line in series.items())
        return svg_image(figure, f"{title}. Last values: {last}")


def usage_chart(counts: np.ndarray) -> Markup:
    """Share of each code in the targets, in descending order, on a logarithmic axis; int `[C, V]`, as SVG."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        size = counts.shape[1]
        for book, row in enumerate(counts):
            share = np.sort(row)[::-1] / max(int(row.sum()), 1)
            used = share[share > 0]
            label = f"codebook {book + 1}" if len(counts) > 1 else "codes, most frequent first"
            axes.plot(np.arange(1, len(used) + 1), used, **line_style(book), label=label)
        axes.axhline(1 / size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="uniform")
        axes.set_yscale("log")
        axes.set_xlim(0, size)
        axes.set_xlabel(f"rank of the code, of {size:,}")
        axes.set_ylabel("share of targets")
        add_legend(axes)
        return svg_image(figure, f"Share of targets of each of {size} codes, sorted")


def spectrogram_chart(log_mel: np.ndarray, mask: np.ndarray, frame_seconds: float = 0.01) -> Markup:
    """Normalised log-mel `[F, M]` with the masked frames (bool `[F]`) shaded, as PNG."""
    with rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = new_figure(9.6, 2.9)
        seconds = len(log_mel) * frame_seconds
        low, high = np.quantile(log_mel.astype(np.float32), [0.02, 0.995])
        axes.imshow(
            log_mel.T.astype(np.float32), origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
            extent=(0, seconds, 0, log_mel.shape[1]), interpolation="nearest",
        )  # fmt: skip
        for start, stop in mask_spans(mask):
            left, right = start * frame_seconds, stop * frame_seconds
            axes.axvspan(left, right, color="white", alpha=0.72, linewidth=0)
            axes.plot([left, right], [log_mel.shape[1] * 1.035] * 2, color=COLOURS[0], linewidth=5, clip_on=False,
                      solid_capstyle="butt")  # fmt: skip
        axes.set_xlabel("seconds")
        axes.set_ylabel("mel bin")
        axes.set_xlim(0, seconds)
        axes.set_ylim(0, log_mel.shape[1])
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        return image("image/png", picture.getvalue(), f"Log-mel spectrogram of {seconds:.1f} s with masked spans", True)


def mask_spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """Runs of True in bool `[F]` as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def rates_chart(title: str, rates: Mapping[str, Sequence[float]], x_label: str) -> Markup:
    """Distribution of the recordings' error rates by system, in percent, as SVG."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        for place, (name, values) in enumerate(rates.items()):
            ranks = (np.arange(len(values)) + 0.5) / max(len(values), 1)
            axes.plot(100 * np.sort(values), ranks, **line_style(place), label=plain(name),
                      marker=MARKERS[place % 7] if len(values) <= 30 else None, markersize=3.5)  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("cumulative share of recordings")
        if len(rates) > 1:
            add_legend(axes)
        return svg_image(figure, title)


def kinds_chart(kinds: Mapping[str, Mapping[str, float]], unit: str) -> Markup:
    """Substitutions, deletions and insertions by system as shares of the reference length, stacked; as SVG.

    Args:
        unit: "words" or "characters".
    """
    names = {"substitutions": "substituted", "deletions": "deleted", "insertions": "inserted"}
    with rc_context(STYLE | {"axes.grid.axis": "x", "hatch.linewidth": 0.7}):
        figure, axes = new_figure(4.7, 3.2)
        labels = [plain(system, 22) for system in kinds]
        figure.set_figheight(max(3.2, 1.2 + 0.26 * sum(label.count("\n") + 1 for label in labels)))
        places, left = np.arange(len(kinds)), np.zeros(len(kinds))
        for name, colour, hatch in zip(names, COLOURS, ("", "////", "...."), strict=False):
            widths = 100 * np.array([shares[name] for shares in kinds.values()])
            axes.barh(places, widths, left=left, height=0.5, color=colour, hatch=hatch, edgecolor="white",
                      linewidth=0.8, label=names[name])  # fmt: skip
            left += widths
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel(f"% of the {unit} in the references")
        axes.margins(y=0.35 if len(kinds) < 4 else 0.06)
        add_legend(axes, columns=3)
        return svg_image(figure, f"Types of errors in {unit} of {', '.join(kinds)}")


def context_chart(curves: Mapping[str, Sequence[Point]], y_label: str) -> Markup:
    """`context_figure` as an image."""
    alt = "; ".join(
        f"{name}: "
        + ", ".join(f"{100 * point.rate:.1f} % at {context_name(point.context_seconds)}" for point in points)
        for name, points in curves.items()
    )
    return svg_image(context_figure(curves, y_label), f"{y_label} against context. {alt}", wide=True)


def context_svg(curves: Mapping[str, Sequence[Point]], y_label: str) -> str:
    """`context_figure` as the content of an SVG file."""
    return svg_text(context_figure(curves, y_label)) + "\n"


def context_figure(curves: Mapping[str, Sequence[Point]], y_label: str) -> Figure:
    """Rates over context on a logarithmic axis with 95 % bands; whole recordings are at the right end.

    Args:
        curves: points by name, sorted by context with the whole recording last.
    """
    points_shown = [point for points in curves.values() for point in points]
    finite = sorted({point.context_seconds for point in points_shown if point.context_seconds})
    has_whole = any(not point.context_seconds for point in points_shown)
    # 1.5 times the distance between two ticks, so that the gap in the axis is visible.
    end = finite[-1] * max(2.0, (finite[-1] / finite[0]) ** 0.18) if finite else 1.0
    with rc_context(STYLE):
        figure, axes = new_figure(7.6, 4.0)
        band = 0.13 if len(curves) <= 3 else 0.0  # more overlapping bands would hide the lines
        for place, (name, points) in enumerate(curves.items()):
            x = np.array([point.context_seconds or end for point in points])
            y = 100 * np.array([point.rate for point in points])
            # The bands of several curves overlap, so bars are drawn too, at slightly different places.
            x = x * 1.012 ** (place - (len(curves) - 1) / 2)
            style = line_style(place)
            axes.plot(x, y, **style, marker=MARKERS[place % 7], markersize=6, label=plain(name))
            known = [k for k, point in enumerate(points) if point.interval is not None]
            if known:
                low, high = 100 * np.array([points[k].interval for k in known], dtype=np.float64).T
                axes.fill_between(x[known], low, high, color=style["color"], alpha=band, linewidth=0)
                axes.vlines(x[known], low, high, color=style["color"], linewidth=1.2, alpha=0.8)
        axes.set_xscale("log")
        axes.set_xticks([*finite, *([end] if has_whole else [])])
        axes.set_xticklabels([*(f"{seconds:g}" for seconds in finite), *(["whole"] if has_whole else [])])
        axes.xaxis.set_minor_locator(NullLocator())
        if has_whole and finite:
            axes.axvline((finite[-1] * end) ** 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.set_xlabel("context, seconds")
        axes.set_ylabel(f"{y_label}, %")
        _extend_to_zero(axes)
        if len(curves) > 1:
            add_legend(axes)
        return figure


def bins_chart(title: str, names: Sequence[str], bins: Mapping[str, Sequence[Bin]], x_label: str) -> Markup:
    """WER of parts of the recordings, in their order, with 95 % intervals, as SVG.

    Marks without an interval are hollow.

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
            hollow_rates = [100 * (parts[known[n]].rate or 0.0) for n in hollow]
            axes.plot(x[hollow], hollow_rates, linestyle="", marker=MARKERS[place % 7], markersize=4.5,
                      color=style["color"], markerfacecolor="white", zorder=3)  # fmt: skip
            for position, k in zip(x, known, strict=True):
                if (bounds := parts[k].interval) is not None:
                    low, high = 100 * bounds[0], 100 * bounds[1]
                    axes.vlines(position, low, high, color=style["color"], linewidth=1.4, alpha=0.75)
        axes.set_xticks(range(len(names)))
        rotation: dict[str, Any] = {"rotation": 35, "ha": "right"} if sum(map(len, names)) > 44 else {}
        axes.set_xticklabels([plain(name) for name in names], **rotation)
        axes.set_xlabel(x_label)
        axes.set_ylabel("WER, %")
        axes.margins(x=0.04)
        _extend_to_zero(axes)
        if len(bins) > 1:
            add_legend(axes)
        rates = "; ".join(
            f"{name}: " + ", ".join("-" if part.rate is None else f"{100 * part.rate:.1f}" for part in parts)
            for name, parts in bins.items()
        )
        return svg_image(figure, f"{title}. WER in % of {', '.join(names)}: {rates}")


def differences_chart(title: str, differences: Sequence[float], y_label: str) -> Markup:
    """Differences between two systems on each recording, sorted, as SVG; negative is better."""
    values = 100 * np.sort(np.asarray(differences, dtype=np.float64))
    better, worse = int((values < 0).sum()), int((values > 0).sum())
    with rc_context(STYLE | {"hatch.linewidth": 0.7}):
        figure, axes = new_figure(4.9, 3.2)
        places = np.arange(len(values))
        width = 0.85 if len(values) <= 60 else 1.0
        for chosen, colour, hatch, name in (
            (values <= 0, COLOURS[0], "", f"better on {better:,}"),
            (values > 0, COLOURS[1], "////", f"worse on {worse:,}"),
        ):
            if chosen.any():  # the legend would show the default colour for an empty group
                axes.bar(places[chosen], values[chosen], width, color=colour, hatch=hatch, edgecolor="white",
                         linewidth=0.5 if len(values) <= 60 else 0.0, label=name)  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=0.9)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(values):,} recordings, sorted")
        axes.set_ylabel(y_label)
        add_legend(axes)
        return svg_image(figure, f"{title}: better on {better}, worse on {worse} of {len(values)} recordings")


def _extend_to_zero(axes: Axes) -> None:
    """Start the y axis at zero unless more than about half of the chart would be empty."""
    low, high = axes.get_ylim()
    if low < 0.55 * high:
        axes.set_ylim(bottom=0)
