"""Pictures of a report: every function returns one `<img>` with its data inside, nothing fetched.

Lines differ in dash as well as in colour, so that a picture reads without colours.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1b1f24", "#59636e", "#e4e7eb"
LINES: Sequence[tuple[str, Any]] = (
    ("#0b5cad", "-"),
    ("#c2410c", (0, (5, 2))),
    ("#2f7d4f", (0, (1, 1.4))),
    ("#7a3e9d", (0, (5, 1.5, 1, 1.5))),
)
"""colour and dash of the first to the fourth line"""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the reader's own font
    "svg.hashsalt": "bestrq",
    "font.size": 10.5,
    "axes.edgecolor": "#9aa4af",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}


@dataclass(frozen=True)
class Series:
    """Values over steps; both `[n]`."""

    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, series: Mapping[str, Series], y_label: str, from_zero: bool = False) -> str:
    """Up to four named lines over updates, as SVG. Few points (a short run) are drawn as dots too."""
    with rc_context(STYLE):
        figure, axes = _figure(4.7, 3.2)
        for (name, one), (colour, dash) in zip(series.items(), LINES, strict=False):
            few = len(one.steps) <= 12
            axes.plot(
                one.steps, one.values, color=colour, linestyle=dash, linewidth=1.8, label=name,
                marker="o" if few else None, markersize=4,
            )  # fmt: skip
        axes.set_xlabel("update")
        axes.set_ylabel(y_label)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
        if len(series) > 1:
            _legend(axes)
        last = "; ".join(f"{name}: {one.values[-1]:.4g} at {one.steps[-1]:g}" for name, one in series.items())
        return _svg(figure, f"{title}. Last values: {last}")


def usage_chart(counts: np.ndarray) -> str:
    """How often every code was used, most used first, on a logarithmic axis; int `[C, V]`, as SVG."""
    with rc_context(STYLE):
        figure, axes = _figure(4.7, 3.2)
        size = counts.shape[1]
        for book, ((colour, dash), row) in enumerate(zip(LINES, counts, strict=False)):
            share = np.sort(row)[::-1] / max(int(row.sum()), 1)
            used = share[share > 0]
            label = f"codebook {book + 1}" if len(counts) > 1 else "codes, most used first"
            axes.plot(np.arange(1, len(used) + 1), used, color=colour, linestyle=dash, linewidth=1.8, label=label)
        axes.axhline(1 / size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="all codes alike")
        axes.set_yscale("log")
        axes.set_xlim(0, size)
        axes.set_xlabel(f"rank of the code, of {size:,}")
        axes.set_ylabel("share of targets")
        _legend(axes)
        return _svg(figure, f"Share of targets of each of {size} codes, sorted")


def spectrogram_chart(log_mel: np.ndarray, mask: np.ndarray, frame_seconds: float = 0.01) -> str:
    """Normalised log-mel `[F, M]` with the masked frames (bool `[F]`) veiled, as PNG."""
    with rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = _figure(9.6, 2.9)
        seconds = len(log_mel) * frame_seconds
        low, high = np.quantile(log_mel.astype(np.float32), [0.02, 0.995])
        axes.imshow(
            log_mel.T.astype(np.float32), origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
            extent=(0, seconds, 0, log_mel.shape[1]), interpolation="nearest",
        )  # fmt: skip
        for start, stop in mask_spans(mask):
            left, right = start * frame_seconds, stop * frame_seconds
            axes.axvspan(left, right, color="white", alpha=0.72, linewidth=0)
            axes.plot([left, right], [log_mel.shape[1] * 1.035] * 2, color=LINES[0][0], linewidth=5, clip_on=False,
                      solid_capstyle="butt")  # fmt: skip
        axes.set_xlabel("seconds")
        axes.set_ylabel("mel bin")
        axes.set_xlim(0, seconds)
        axes.set_ylim(0, log_mel.shape[1])
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        return _img("image/png", picture.getvalue(), f"Log-mel spectrogram of {seconds:.1f} s with masked spans", True)


def mask_spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """Runs of True of bool `[F]` as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def rates_chart(title: str, rates: Mapping[str, Sequence[float]], x_label: str) -> str:
    """Error rates of the recordings of up to four systems, each sorted, as SVG: where the errors sit."""
    with rc_context(STYLE):
        figure, axes = _figure(4.7, 3.2)
        for (name, values), (colour, dash) in zip(rates.items(), LINES, strict=False):
            ranks = (np.arange(len(values)) + 0.5) / max(len(values), 1)
            axes.plot(np.sort(values), ranks, color=colour, linestyle=dash, linewidth=1.8, label=name,
                      marker="o" if len(values) <= 30 else None, markersize=3.5)  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of recordings at or below")
        if len(rates) > 1:
            _legend(axes)
        return _svg(figure, title)


def kinds_chart(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """Substitutions, deletions and insertions of systems, as shares of the reference's length, stacked; as SVG."""
    names = {"substitutions": "substituted", "deletions": "deleted", "insertions": "inserted"}
    with rc_context(STYLE | {"axes.grid.axis": "x", "hatch.linewidth": 0.7}):
        figure, axes = _figure(4.7, 3.2)
        left = np.zeros(len(kinds))
        for name, (colour, _), hatch in zip(names, LINES, ("", "////", "...."), strict=False):
            widths = np.array([one[name] for one in kinds.values()])
            axes.barh(list(kinds), widths, left=left, height=0.5, color=colour, hatch=hatch, edgecolor="white",
                      linewidth=0.8, label=names[name])  # fmt: skip
            left += widths
        axes.invert_yaxis()
        axes.set_xlabel("share of the reference's characters")
        axes.margins(y=0.35)
        _legend(axes, columns=3)
        return _svg(figure, f"Kinds of character errors of {', '.join(kinds)}")


def _legend(axes: Axes, columns: int = 2) -> None:
    """Above the plot, where it hides no line."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=2.2, columnspacing=1.1,
        handletextpad=0.6, borderpad=0.2,
    )  # fmt: skip


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without pyplot, which would keep every one of them for the life of the process."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, alt: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    drawing = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>", "", text.getvalue(), flags=re.DOTALL).strip()
    drawing = drawing.replace("'DejaVu Sans'", "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans'")
    return _img("image/svg+xml", drawing.encode(), alt)


def _img(media_type: str, content: bytes, alt: str, wide: bool = False) -> str:
    data = base64.b64encode(content).decode("ascii")
    style = ' class="wide"' if wide else ""
    return f'<img{style} src="data:{media_type};base64,{data}" alt="{html.escape(alt, quote=True)}">'
