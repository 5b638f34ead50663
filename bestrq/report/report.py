"""A report as one HTML page that needs nothing but itself: no font, no network, and no script to be read.

Small functions return HTML fragments, those of tables are in `tables`; `write_report` puts them together. Whatever
comes from a file is escaped. `report.js` sorts and searches tables and opens transcripts; a policy in the page lets
that script run, by its hash, and no other, and lets nothing be fetched but audio.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq.report.tables import language_text, percent
from bestrq.scoring.word_errors import align_words
from common.files import write_file

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="ascii")
SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="ascii")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src 'self' file: http: https: data:; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


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
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
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
<script>{SCRIPT}</script>
</body>
</html>
"""
    write_file(Path(path), page)


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is "note" or nothing."""
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{html.escape(text)}</p>"


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
        language = language_text(sample.language)
        heading = f"{html.escape(sample.id)} <span>{html.escape(language)}</span>"
        blocks.append(f'<article class="transcript"><h3>{heading}</h3><dl>{"".join(entries)}</dl></article>')
    return legend + "".join(blocks)


def details(summary: str, body: str) -> str:
    """HTML that is shown on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{body}\n</details>"


def json_block(value: Any, kind: str) -> str:
    """JSON-able data for the page's script, in an element of a class. No text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def facts(values: Mapping[str, str]) -> str:
    """Names and values as a list."""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items())
    return f'<dl class="facts">{items}</dl>'


def commands(lines: Sequence[str]) -> str:
    """Command lines as they were given."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


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
