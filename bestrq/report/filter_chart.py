"""Chart of the precision of a filter by confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context

from bestrq.report.chart_style import MUTED, STYLE, add_legend, line_style, new_figure, svg_text


def precision_svg(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """CER and WER of the kept recordings over the kept share of the audio, in percent, as SVG.

    Args:
        rows: fields `kept_share`, `cer` and `wer` for each threshold, as in `pipelines.pseudo_labels.PrecisionRow`.
        chosen: those of the filter, marked by a vertical line.
    """
    with rc_context(STYLE):
        figure, axes = new_figure(4.7, 3.2)
        for place, rate in enumerate(("cer", "wer")):
            known = [(100 * row["kept_share"], 100 * row[rate]) for row in rows if row[rate] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), **line_style(place), marker="o", markersize=4, label=rate.upper())
        axes.axvline(100 * chosen["kept_share"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="filter")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("kept audio, most confident first, %")
        axes.set_ylabel("error rate of kept pseudo-labels, %")
        add_legend(axes, columns=3)
        return svg_text(figure)
