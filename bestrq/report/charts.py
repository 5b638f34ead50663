"""Pictures of a report: every function returns one `<img>` with its data inside, nothing fetched.

Lines differ in dash as well as in colour, so that a picture reads without colours.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

from bestrq.report.drawing import (
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
)


@dataclass(frozen=True)
class Series:
    """Values over steps; both `[n]`."""

    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, series: Mapping[str, Series], y_label: str, from_zero: bool = False) -> str:
    """Named lines over updates, as SVG. Few points (a short run) are drawn as dots too."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        for place, (name, one) in enumerate(series.items()):
            few = len(one.steps) <= 12
            axes.plot(
                one.steps, one.values, **line_style(place), label=plain(name), marker="o" if few else None,
                markersize=4,
            )  # fmt: skip
        axes.set_xlabel("update")
        axes.set_ylabel(plain(y_label))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
        if len(series) > 1:
            add_legend(axes)
        last = "; ".join(f"{name}: {one.values[-1]:.4g} at {one.steps[-1]:g}" for name, one in series.items())
        return svg_image(figure, f"{title}. Last values: {last}")


def usage_chart(counts: np.ndarray) -> str:
    """How often every code was used, most used first, on a logarithmic axis; int `[C, V]`, as SVG."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        size = counts.shape[1]
        for book, row in enumerate(counts):
            share = np.sort(row)[::-1] / max(int(row.sum()), 1)
            used = share[share > 0]
            label = f"codebook {book + 1}" if len(counts) > 1 else "codes, most used first"
            axes.plot(np.arange(1, len(used) + 1), used, **line_style(book), label=label)
        axes.axhline(1 / size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="all codes alike")
        axes.set_yscale("log")
        axes.set_xlim(0, size)
        axes.set_xlabel(f"rank of the code, of {size:,}")
        axes.set_ylabel("share of targets")
        add_legend(axes)
        return svg_image(figure, f"Share of targets of each of {size} codes, sorted")


def spectrogram_chart(log_mel: np.ndarray, mask: np.ndarray, frame_seconds: float = 0.01) -> str:
    """Normalised log-mel `[F, M]` with the masked frames (bool `[F]`) veiled, as PNG."""
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
    """Runs of True of bool `[F]` as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def rates_chart(title: str, rates: Mapping[str, Sequence[float]], x_label: str) -> str:
    """Error rates of the recordings of systems, each sorted, as SVG: where the errors sit."""
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        for place, (name, values) in enumerate(rates.items()):
            ranks = (np.arange(len(values)) + 0.5) / max(len(values), 1)
            axes.plot(100 * np.sort(values), ranks, **line_style(place), label=plain(name),
                      marker=MARKERS[place % 7] if len(values) <= 30 else None, markersize=3.5)  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of recordings at or below")
        if len(rates) > 1:
            add_legend(axes)
        return svg_image(figure, title)


def kinds_chart(kinds: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Substitutions, deletions and insertions of systems, in shares of the reference's length, stacked; as SVG.

    Args:
        unit: "words" or "characters".
    """
    names = {"substitutions": "substituted", "deletions": "deleted", "insertions": "inserted"}
    with rc_context(STYLE | {"axes.grid.axis": "x", "hatch.linewidth": 0.7}):
        figure, axes = new_figure(4.7, 3.2)
        names_shown = [plain(one, 22) for one in kinds]
        figure.set_figheight(max(3.2, 1.2 + 0.26 * sum(one.count("\n") + 1 for one in names_shown)))
        places, left = np.arange(len(kinds)), np.zeros(len(kinds))
        for name, colour, hatch in zip(names, COLOURS, ("", "////", "...."), strict=False):
            widths = 100 * np.array([one[name] for one in kinds.values()])
            axes.barh(places, widths, left=left, height=0.5, color=colour, hatch=hatch, edgecolor="white",
                      linewidth=0.8, label=names[name])  # fmt: skip
            left += widths
        axes.set_yticks(places, names_shown)
        axes.invert_yaxis()
        axes.set_xlabel(f"% of the {unit} in the references")
        axes.margins(y=0.35 if len(kinds) < 4 else 0.06)
        add_legend(axes, columns=3)
        return svg_image(figure, f"Kinds of errors in {unit} of {', '.join(kinds)}")
