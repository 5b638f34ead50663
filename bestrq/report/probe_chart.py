"""Chart of a probe ladder: every probe by layer."""

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bestrq.report.chart_style import COLOURS, MUTED, STYLE, line_style, plain

COLUMNS = 3
FIGURE_TITLES = {
    "frame_correlation": "correlation of frames 40 ms apart",
    "effective_rank": "effective rank (participation ratio)",
}


def draw_probes(summary: Mapping[str, Any], titles: Mapping[str, str]) -> Figure:
    """Draw one panel per probe: encoders as lines over layers with 95 % intervals, log-mel as a band, chance dotted.

    Args:
        summary: see `pipelines.probe_summary.summarise`.
        titles: title of every probe.
    """
    sources = summary["sources"]
    panels = [name for name in [*titles, *FIGURE_TITLES] if any(name in s["layers"]["0"] for s in sources)]
    rows = -(-len(panels) // COLUMNS)
    with rc_context(STYLE):
        figure = Figure(figsize=(4 * COLUMNS, 2.9 * rows), dpi=150, layout="constrained")
        grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for axes, name in zip(grid, panels, strict=False):
            for place, source in enumerate(sources):
                _draw_source(axes, place, source, name)
            if name in summary["chance"]:
                axes.axhline(100 * summary["chance"][name], color=MUTED, linestyle=":", linewidth=1)
            unit = "" if name == "nats" or name in FIGURE_TITLES else " (%)"
            axes.set_title(plain({**titles, **FIGURE_TITLES}[name] + unit), fontsize=10.5)
            axes.set_xlabel("layer (0: subsampling)")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)))
    return figure


def _draw_source(axes: Any, place: int, source: Mapping[str, Any], name: str) -> None:
    """Draw the numbered layers of a source; the weighted sum is in the table only."""
    scale = 1 if name == "nats" or name in FIGURE_TITLES else 100
    points = []
    for layer, values in source["layers"].items():
        if layer.isdecimal() and values.get(name) is not None:
            value = values[name]["rate"] if isinstance(values[name], Mapping) else values[name]
            interval = values[name]["interval"] if isinstance(values[name], Mapping) else None
            if value is not None:
                points.append((int(layer), scale * value, [scale * end for end in interval or (value, value)]))
    if not points:
        return
    x, y, ends = zip(*points, strict=True)
    label = plain(source["name"])
    if source["kind"] == "log-mel":
        axes.axhline(y[0], color=COLOURS[5], linewidth=1.4, linestyle="--", label=label)
        axes.axhspan(*ends[0], color=COLOURS[5], alpha=0.1, linewidth=0)
        return
    shift = 0.06 * (place - 1)  # so that intervals do not cover each other
    errors = [[value - low for value, (low, _) in zip(y, ends, strict=True)]]
    errors.append([high - value for value, (_, high) in zip(y, ends, strict=True)])
    style = {"marker": "o", "markersize": 3.5, "elinewidth": 1, **line_style(place)}
    axes.errorbar([value + shift for value in x], y, errors, label=label, **style)
