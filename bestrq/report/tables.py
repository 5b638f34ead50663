"""Tables of a report as HTML. Whatever comes from a file is escaped.

A sortable table is a plain table until the page's script makes buttons of its headings.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.languages import language_code, language_name

_GROUPS = {"all": "All recordings", "": "not given"}


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: str = ""
    """class of its cells: 'left' or 'wrap' for text, 'rate', 'range', 'bar', 'size' (not on small screens), or ''"""


@dataclass(frozen=True)
class Cell:
    """A cell whose text is not what it is sorted by, or that is not text."""

    text: str
    value: float | None = None
    """what its column is sorted by; None comes last"""
    markup: str = ""
    """HTML in place of the text"""


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], sortable: bool = False,
    attributes: Iterable[Mapping[str, str]] = (), tall: bool = False,
) -> str:  # fmt: skip
    """Rows of cells under headings.

    Args:
        attributes: of every row, such as `{"data-recording": "0"}`; none where left out.
        tall: scrolls within a window of its own under a heading that stays.
    """
    heads = "".join(f"<th{_class(column.kind)}>{html.escape(column.title)}</th>" for column in columns)
    given = iter(attributes)
    lines = []
    for row in rows:
        cells = "".join(_cell(cell, column.kind) for cell, column in zip(row, columns, strict=True))
        extra = "".join(f' {name}="{html.escape(value, quote=True)}"' for name, value in next(given, {}).items())
        lines.append(f"<tr{extra}>{cells}</tr>")
    scroll, kind = ("scroll tall" if tall else "scroll"), _class("sortable" if sortable else "")
    return (
        f'<div class="{scroll}"><table{kind}>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def language_text(language: str) -> str:
    """English name of a dataset's language, with the dataset's code if that says more: "Portuguese (pt-BR)"."""
    name = _GROUPS.get(language) or language_name(language)
    return name if language in (*_GROUPS, name, language_code(language)) else f"{name} ({language})"


def percent(rate: float | None) -> str:
    """`0.1234` as `12.3 %`; a dash for no rate."""
    return rate_text(rate) if rate is None else f"{rate_text(rate)} %"


def rate_text(rate: float | None) -> str:
    """`0.1234` as `12.3`; a dash for no rate."""
    return "\N{EN DASH}" if rate is None else f"{100 * rate:.1f}"


def points(difference: float | None) -> str:
    """`-0.0123` as `-1.2`, a difference in percentage points."""
    return "\N{EN DASH}" if difference is None else f"{100 * difference:+.1f}"


def interval(bounds: Sequence[float] | None, signed: bool = False) -> str:
    """`(0.1, 0.2)` as `10.0 to 20.0`, in percent; empty for none."""
    sign = "+" if signed else ""
    return "" if bounds is None else f"{100 * bounds[0]:{sign}.1f} to {100 * bounds[1]:{sign}.1f}"


def rate_cell(rate: float | None) -> Cell:
    """A rate in percent, sorted by its exact value."""
    return Cell(rate_text(rate), rate)


def number_cell(value: float | None, digits: int = 1) -> Cell:
    """A number with so many decimals; a dash for none."""
    return Cell("\N{EN DASH}" if value is None else f"{value:,.{digits}f}", value)


def headline_table(systems: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """WER and CER with intervals, of every system on every language.

    Args:
        systems: by system, by language, `CorpusScore.summary()`; all of them on the same recordings.
    """
    first = next(iter(systems.values()))
    languages = [one for one in first if not (one == "all" and len(first) == 2)]
    summaries = [one for scores in systems.values() for one in scores.values()]
    highest = highest_end(summaries)
    rows = []
    for language in languages:
        there = {system: scores[language] for system, scores in systems.items() if language in scores}
        for position, (system, one) in enumerate(there.items()):
            name = html.escape(language_text(language)) if position == 0 else ""
            size = (f"{one['num_recordings']:,}", f"{one['seconds'] / 60:,.1f}") if position == 0 else ("", "")
            rows.append(
                f'<tr class="{"group" if position == 0 else "more"}"><td class="left">{name}</td>'
                f'<td class="left">{html.escape(system)}</td>'
                f'<td class="size">{size[0]}</td><td class="size">{size[1]}</td>'
                f'<td class="rate">{rate_text(one["wer"])}</td><td class="range">{interval(one["wer_interval"])}</td>'
                f'<td class="bar">{interval_bar(one["wer"], one["wer_interval"], highest)}</td>'
                f'<td class="rate">{rate_text(one["cer"])}</td><td class="range">{interval(one["cer_interval"])}</td>'
                "</tr>"
            )
    return f"""<div class="scroll"><table>
<thead><tr><th class="left">Language</th><th class="left">System</th>
<th class="size">Recordings</th><th class="size">Minutes</th><th>WER, %</th><th>95 % interval</th>
<th class="bar"></th><th>CER, %</th><th>95 % interval</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>"""


def error_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """What kinds of errors there are: `CorpusScore.summary()` by system."""
    rows = []
    for system, one in systems.items():
        for unit in ("words", "characters"):
            counts = one[unit]
            length = max(counts["hits"] + counts["substitutions"] + counts["deletions"], 1)
            cells = "".join(
                f'<td>{counts[kind]:,}</td><td class="range">{100 * counts[kind] / length:.1f} %</td>'
                for kind in ("substitutions", "deletions", "insertions")
            )
            rows.append(f'<tr><td class="left">{html.escape(system)}</td><td class="left">{unit}</td>'
                        f"<td>{length:,}</td>{cells}</tr>")  # fmt: skip
    return f"""<div class="scroll"><table>
<thead><tr><th class="left">System</th><th class="left">Unit</th><th>In the references</th>
<th colspan="2">Substituted</th><th colspan="2">Deleted</th><th colspan="2">Inserted</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>"""


def interval_bar(rate: float | None, bounds: Sequence[float] | None, highest: float) -> str:
    """A dot at the rate and a line over the interval, from 0 to the highest end of the table."""
    if rate is None or highest <= 0:
        return ""
    low, high = bounds or (rate, rate)
    x, left, right = (4 + 192 * value / highest for value in (rate, low, high))
    return (
        '<svg viewBox="0 0 200 18" preserveAspectRatio="none" aria-hidden="true">'
        '<line x1="4" x2="196" y1="9" y2="9" stroke="#e4e7eb" stroke-width="1"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="9" y2="9" stroke="#7fb0e0" stroke-width="7"/>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="15" stroke="#0b5cad" stroke-width="3"/></svg>'
    )


def highest_end(summaries: Iterable[Mapping[str, Any]]) -> float:
    """The largest WER or end of its interval: the scale of `interval_bar`."""
    return max((end for one in summaries for end in _ends(one["wer"], one["wer_interval"])), default=1.0)


def _cell(cell: Cell | str, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{_class(kind)}>{html.escape(cell)}</td>"
    value = "" if cell.value is None else f' data-value="{cell.value:.8g}"'
    return f"<td{_class(kind)}{value}>{cell.markup or html.escape(cell.text)}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _ends(rate: float | None, bounds: Sequence[float] | None) -> list[float]:
    return [one for one in (rate, *(bounds or ())) if one is not None]
