"""HTML page of a report and its elements: Jinja2 templates (`templates/`) with autoescape.

A page is one self-contained file: style, script and images are embedded; only audio is loaded from other files. A
content security policy allows the page's own script (`report.js`), by its hash, and no other. Without the script the
page is complete except for sorting, searching and opening transcripts.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bestrq.report import text
from common.files import write_file

_FOLDER = Path(__file__).parent
STYLE = (_FOLDER / "report.css").read_text(encoding="ascii")
SCRIPT = (_FOLDER / "report.js").read_text(encoding="ascii")


def policy(script: str) -> str:
    """Content security policy of a page that runs this script and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src 'self' file: http: https: data:; "
        f"script-src 'sha256-{digest}'"
    )


@dataclass(frozen=True)
class Section:
    """Section of a page: a heading and the HTML under it."""

    title: str
    body: Markup


@dataclass(frozen=True)
class Column:
    """Column of a table."""

    title: str
    kind: str = ""
    """CSS class of its cells: 'left' or 'wrap' for text, 'rate', 'range', 'bar', or '' for other numbers"""


@dataclass(frozen=True)
class Cell:
    """Table cell that is sorted by a number, not by its text."""

    text: str
    value: float | None
    """sort key; None sorts last"""


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, > and &, so no text can end its script element.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False, "allow_nan": False, "separators": (",", ":"),
    }  # fmt: skip
    environment.filters |= {
        "percent": text.percent,
        "rate": text.rate_text,
        "interval": text.interval,
        "number": text.number,
        "language": text.language_text,
    }
    return environment


_TEMPLATES = _environment()
ELEMENTS: Any = _TEMPLATES.get_template("elements.html").module


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of `templates/`. Values are escaped unless they are Markup."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def write_page(
    path: str | Path, title: str, lead: str, cards: Mapping[str, str], sections: Sequence[Section],
    script: str = SCRIPT,
) -> None:  # fmt: skip
    """Write a page.

    Args:
        lead: sentence under the title.
        cards: headline figures by name: `{"CER, pretrained": "18.2 %"}`.
        script: JavaScript of the page, from files of this folder.
    """
    # Style and script are the files of this folder; the hash in the policy is that of the unescaped script.
    page = render(
        "page.html", title=title, lead=lead, cards=cards, sections=sections, policy=Markup(policy(script)),
        style=Markup(STYLE), script=Markup(script),
    )  # fmt: skip
    write_file(Path(path), page)


def paragraph(text: str, kind: str = "") -> Markup:
    """Paragraph; `kind` is "note" or empty."""
    return ELEMENTS.paragraph(text, kind)


def figure(title: str, image: Markup, caption: str = "") -> Markup:
    """Image of `charts` with a heading and a caption."""
    return ELEMENTS.figure(title, image, caption)


def figure_grid(figures: Sequence[Markup]) -> Markup:
    """Figures side by side if the screen is wide enough."""
    return ELEMENTS.figure_grid(figures)


def interval_bar(rate: float | None, bounds: Sequence[float] | None, highest: float) -> Markup:
    """Mark at a rate and a line over its interval, on a scale from 0 to `highest`; empty without a rate."""
    return ELEMENTS.interval_bar(rate, bounds, highest)
