"""How the charts of a report are drawn: style, lines that differ without colour, images with their data inside."""

import base64
import html
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#1b1f24", "#59636e", "#e4e7eb"
COLOURS = ("#0b5cad", "#c2410c", "#2f7d4f", "#7a3e9d", "#8a6d00", "#374151")
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
MOST_NAMES = 12
"""in a legend"""


def line_style(place: int) -> dict[str, Any]:
    """Colour and dash of the n-th line, for `Axes.plot`; the first 36 differ."""
    return {"color": COLOURS[place % 6], "linestyle": DASHES[(place + place // 6) % 6], "linewidth": 1.8}


def plain(text: str, width: int = 0) -> str:
    """Text that matplotlib shows as it is, in up to three lines of a width, if that is given: a dollar starts no
    formula, and the text starts with no underscore, which would keep it out of the legend."""
    lines = textwrap.fill(text, width, max_lines=3, placeholder=" ...") if width else text
    return ("\u200b" if text.startswith("_") else "") + lines.replace("$", r"\$")


def add_legend(axes: Axes, columns: int = 2) -> None:
    """Above the plot, where it hides no line; in one column where a name is long; the figure grows by it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MOST_NAMES:
        handles = [*handles[:MOST_NAMES], Line2D([], [], linestyle="")]
        names = [*names[:MOST_NAMES], f"... and {len(names) - MOST_NAMES} more, in the table"]
    names = [textwrap.fill(name, int(9 * figure.get_figwidth())) for name in names]
    columns = 1 if max(map(len, names)) > 4 * figure.get_figwidth() else columns
    lines = sum(name.count("\n") + 1 for name in names) / columns
    figure.set_figheight(figure.get_figheight() + 0.25 * max(lines - 2, 0))
    figure.legend(
        handles, names, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.1,
        handletextpad=0.6, borderpad=0.2,
    )  # fmt: skip


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without pyplot, which would keep every one of them for the life of the process."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def svg_image(figure: Figure, alt: str, wide: bool = False) -> str:
    """A figure as an image; `alt` says in words what it shows."""
    return image("image/svg+xml", svg_text(figure).encode(), alt, wide)


def svg_text(figure: Figure) -> str:
    """A figure as SVG, the same bytes every time."""
    text = io.StringIO()
    with rc_context(STYLE):  # how text is written is settled here, not where the figure was made
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    drawing = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>", "", text.getvalue(), flags=re.DOTALL).strip()
    return drawing.replace("'DejaVu Sans'", "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans'")


def image(media_type: str, content: bytes, alt: str, wide: bool = False) -> str:
    """An `<img>` with its content inside; a wide one keeps its width on a small screen, and is scrolled."""
    data = base64.b64encode(content).decode("ascii")
    style = ' class="wide"' if wide else ""
    return f'<img{style} src="data:{media_type};base64,{data}" alt="{html.escape(alt, quote=True)}">'
