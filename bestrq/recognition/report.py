"""A report as one HTML page that needs nothing but itself: no script, no font, no network.

Small functions return HTML fragments; `write_report` puts them together. Whatever comes from a file is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq.files import write_file
from bestrq.recognition.scoring import align_words

LANGUAGES = {
    "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "all": "All recordings", "": "not given",
}  # fmt: skip

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="ascii")


@dataclass(frozen=True)
class Section:
    """A heading and the HTML under it."""

    title: str
    body: str


@dataclass(frozen=True)
class Sample:
    """A recording as several systems heard it; texts are normalised."""

    id: str
    language: str
    reference: str
    hypotheses: Mapping[str, str]
    """by system"""
    rates: Mapping[str, float | None]
    """CER by system"""


def write_report(
    path: str | Path, title: str, lead: str, cards: Mapping[str, str], sections: Sequence[Section]
) -> None:
    """Write the page.

    Args:
        lead: a sentence under the title, plain text.
        cards: figures that stand at the top, by what they are: `{"CER, pretrained": "18.2 %"}`.
        sections: bodies are HTML made by the functions here; titles are plain text.
    """
    items = "".join(
        f"<li><span>{html.escape(name)}</span><b>{html.escape(value)}</b></li>" for name, value in cards.items()
    )
    body = "\n".join(f"<section>\n<h2>{html.escape(one.title)}</h2>\n{one.body}\n</section>" for one in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
<ul class="cards">{items}</ul>
</header>
{body}
</main>
</body>
</html>
"""
    write_file(Path(path), page)


def percent(rate: float | None) -> str:
    """`0.1234` as `12.3 %`; a dash for no rate."""
    return _rate(rate) if rate is None else f"{_rate(rate)} %"


def interval(bounds: Sequence[float] | None) -> str:
    """`(0.1, 0.2)` as `10.0 to 20.0`, in percent; empty for none."""
    return "" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is "note" or nothing."""
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{html.escape(text)}</p>"


def headline_table(systems: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """WER and CER with intervals, of every system on every language.

    Args:
        systems: by system, by language, `CorpusScore.summary()`; all of them on the same recordings.
    """
    first = next(iter(systems.values()))
    languages = [one for one in first if not (one == "all" and len(first) == 2)]
    summaries = [one for scores in systems.values() for one in scores.values()]
    highest = max((end for one in summaries for end in _ends(one["cer"], one["cer_interval"])), default=1.0)
    rows = []
    for language in languages:
        for position, (system, scores) in enumerate(systems.items()):
            one = scores[language]
            name = html.escape(LANGUAGES.get(language, language)) if position == 0 else ""
            size = (f"{one['num_recordings']:,}", f"{one['seconds'] / 60:,.1f}") if position == 0 else ("", "")
            rows.append(
                f'<tr class="{"group" if position == 0 else "more"}"><td class="left">{name}</td>'
                f'<td class="left">{html.escape(system)}</td>'
                f'<td class="size">{size[0]}</td><td class="size">{size[1]}</td>'
                f'<td class="rate">{_rate(one["cer"])}</td><td class="range">{interval(one["cer_interval"])}</td>'
                f'<td class="bar">{_interval_bar(one["cer"], one["cer_interval"], highest)}</td>'
                f'<td class="rate">{_rate(one["wer"])}</td><td class="range">{interval(one["wer_interval"])}</td></tr>'
            )
    return f"""<div class="scroll"><table>
<thead><tr><th class="left">Language</th><th class="left">System</th>
<th class="size">Recordings</th><th class="size">Minutes</th><th>CER, %</th><th>95 % interval</th>
<th class="bar"></th><th>WER, %</th><th>95 % interval</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>"""


def error_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """What kinds of errors there are: `CorpusScore.summary()` by system."""
    rows = []
    for system, one in systems.items():
        for unit in ("characters", "words"):
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


def figure(title: str, image: str, caption: str = "") -> str:
    """An image of `charts` with a heading and a caption."""
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><h3>{html.escape(title)}</h3><div class="scroll">{image}</div>{below}</figure>'


def chart_grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="charts">{"".join(figures)}</div>'


def transcripts(samples: Sequence[Sample], max_words: int = 90) -> str:
    """Samples with their errors marked, by colour and by style of text; long ones are cut after `max_words` words."""
    legend = (
        '<p class="note">How to read: <span class="sub">heard <s>said</s></span> a substitution, '
        "<ins>heard</ins> an insertion, <del>said</del> a deletion. Texts are normalised, as they were scored.</p>"
    )
    blocks = []
    for sample in samples:
        entries = [f"<dt>reference</dt><dd>{html.escape(_shorten(sample.reference, max_words))}</dd>"]
        for system, hypothesis in sample.hypotheses.items():
            rate = f"CER {percent(sample.rates[system])}"
            marked = _marked(sample.reference, hypothesis, max_words)
            entries.append(f"<dt><b>{html.escape(system)}</b> {rate}</dt><dd>{marked}</dd>")
        language = LANGUAGES.get(sample.language, sample.language)
        heading = f"{html.escape(sample.id)} <span>{html.escape(language)}</span>"
        blocks.append(f'<article class="transcript"><h3>{heading}</h3><dl>{"".join(entries)}</dl></article>')
    return legend + "".join(blocks)


def facts(values: Mapping[str, str]) -> str:
    """Names and values as a list."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items())
    return f'<dl class="facts">{items}</dl>'


def commands(lines: Sequence[str]) -> str:
    """Command lines as they were given."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def _rate(rate: float | None) -> str:
    return "\N{EN DASH}" if rate is None else f"{100 * rate:.1f}"


def _ends(rate: float | None, bounds: Sequence[float] | None) -> list[float]:
    return [one for one in (rate, *(bounds or ())) if one is not None]


def _interval_bar(rate: float | None, bounds: Sequence[float] | None, highest: float) -> str:
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


def _shorten(text: str, max_words: int) -> str:
    words = text.split()
    rest = len(words) - max_words
    return text if rest <= 0 else f"{' '.join(words[:max_words])} ... ({rest:,} more words)"


def _marked(reference: str, hypothesis: str, max_words: int) -> str:
    pieces: list[str] = []
    room = max_words
    for mark in align_words(reference, hypothesis):
        said, heard = ([html.escape(word) for word in text.split()] for text in (mark.reference, mark.hypothesis))
        if mark.kind == "equal":
            pieces.append(" ".join(heard[:room]))
        elif mark.kind == "insert":
            pieces.append(f"<ins>{' '.join(heard[:room])}</ins>")
        elif mark.kind == "delete":
            pieces.append(f"<del>{' '.join(said[:room])}</del>")
        else:
            pairs = list(zip(said, heard, strict=True))
            pieces += [f'<span class="sub">{new} <s>{old}</s></span>' for old, new in pairs[:room]]
        room -= max(len(said), len(heard))
        if room <= 0:
            break
    if room < 0:
        pieces.append("...")
    return " ".join(pieces) or '<span class="note">(nothing)</span>'
