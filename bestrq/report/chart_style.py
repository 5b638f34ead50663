"""Style of the charts of a report, and figures as `<img>` elements with their data inside."""

import base64
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#1b1f24", "#59636e", "#e4e7eb"
COLOURS = ("#0b5cad", "#c2410c", "#2f7d4f", "#7a3e9d", "#8a6d00", "#374151")
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the reader's font
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
MAX_LEGEND_NAMES = 12


def line_style(place: int) -> dict[str, Any]:
    """Colour and dash of a line, for `Axes.plot`; the first 36 places differ."""
    return {"color": COLOURS[place % 6], "linestyle": DASHES[(place + place // 6) % 6], "linewidth": 1.8}


def plain(text: str, width: int = 0) -> str:
    """Escape text for matplotlib: a dollar starts a formula, a leading underscore keeps a label out of the legend.

    With a width, the text is wrapped to at most three lines.
    """
    lines = textwrap.fill(text, width, max_lines=3, placeholder=" ...") if width else text
    return ("\u200b" if text.startswith("_") else "") + lines.replace("$", r"\$")


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Add a legend above the plot, in one column if a name is long. The figure grows by the height of the legend."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MAX_LEGEND_NAMES:
        handles = [*handles[:MAX_LEGEND_NAMES], Line2D([], [], linestyle="")]
        names = [*names[:MAX_LEGEND_NAMES], f"... and {len(names) - MAX_LEGEND_NAMES} more, in the table"]
    names = [textwrap.fill(name, int(9 * figure.get_figwidth())) for name in names]
    columns = 1 if max(map(len, names)) > 4 * figure.get_figwidth() else columns
    lines = sum(name.count("\n") + 1 for name in names) / columns
    figure.set_figheight(figure.get_figheight() + 0.25 * max(lines - 2, 0))
    figure.legend(
        handles, names, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.1,
        handletextpad=0.6, borderpad=0.2,
    )  # fmt: skip


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Figure outside of pyplot, which would keep every figure in memory."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def svg_image(figure: Figure, alt: str, wide: bool = False) -> Markup:
    """Figure as an `<img>`; `alt` describes it in words."""
    return image("image/svg+xml", svg_text(figure).encode(), alt, wide)


def svg_text(figure: Figure) -> str:
    """Figure as SVG; the bytes are reproducible."""
    text = io.StringIO()
    with rc_context(STYLE):  # svg.fonttype and svg.hashsalt apply at the time of saving
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    drawing = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>", "", text.getvalue(), flags=re.DOTALL).strip()
    return drawing.replace("'DejaVu Sans'", "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans'")


def image(media_type: str, content: bytes, alt: str, wide: bool = False) -> Markup:
    """`<img>` with its content inside. A wide one keeps its width on a small screen, where it scrolls."""
    data = base64.b64encode(content).decode("ascii")
    style = Markup(' class="wide"') if wide else ""
    return Markup('<img{} src="data:{};base64,{}" alt="{}">').format(style, media_type, data, alt)
