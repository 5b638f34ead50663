"""TextGrid: annotations of Praat, as written by forced aligners (MFA, WebMAUS, LibriSpeech alignments).

Praat reads the numbers, "strings" and <flags> of a text file that are separated by spaces; all other text, such as
`xmin =` or `intervals [3]:` of the long format, is a comment (Praat's manual, "TextGrid file formats"). So one parser
reads the long and the short format.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from data.transcripts import Word
from data.word_times.base import in_order, merged, read_bytes, word_text

_TOKEN = re.compile(
    r'(?P<string>"[^"]*(?:""[^"]*)*")|(?P<open>")|(?P<comment>![^\n]*)'
    r"|(?P<flag><[^<>\s]*>)(?!\S)|(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)s?(?!\S)|(?P<remark>[^\s\"]+)"
)


def read_textgrid(path: str | Path, tier: str = "words", duration: float = math.inf) -> list[Word]:
    """Read the intervals of a tier as words; empty intervals, sil and sp are silence.

    The name of the tier is not case-sensitive. Tiers "SPEAKER - words", as MFA writes them for several speakers, are
    merged with it by time. UTF-8, or UTF-16 with a byte-order mark.

    Args:
        duration: of the recording in seconds, if known.
    Raises:
        UserError: naming file and line: not a TextGrid, truncated, no such tier (the message lists them), or intervals
            that are unsorted, overlap, or lie outside the tier.
    """
    path = Path(path)
    text = _decode(path)
    reader = _Reader(path, text)
    kind = reader.string(), reader.string()
    if not kind[0].startswith("ooTextFile") or kind[1] != "TextGrid":
        raise UserError(f"{path}: starts with {kind[0][:40]!r}, {kind[1][:40]!r}; not a TextGrid saved as text")
    reader.number(), reader.number()
    tiers = reader.count() if reader.flag() == "<exists>" else 0
    names, streams = [], []
    for _ in range(tiers):
        is_intervals, name = reader.string() == "IntervalTier", reader.string()
        start, end = reader.number(), reader.number()
        selected = name.lower() == tier.lower() or name.lower().endswith(f" - {tier.lower()}")
        names.append(name)
        words, places = [], []
        for _ in range(reader.count()):
            word_start = reader.number()
            word_end = reader.number() if is_intervals else word_start
            place = reader.place
            label = reader.string()
            if is_intervals and selected:
                word = word_text(label, reader.where(place))
                # Limits and intervals have the same number of digits: only rounding needs a tolerance.
                if not start - 1e-3 <= word_start <= word_end <= end + 1e-3:
                    interval = f"interval {word_start} to {word_end} in a tier {start} to {end}"
                    raise UserError(f"{reader.where(place)}: {interval}")
                if word:
                    words.append(Word(word, max(word_start, 0.0), word_end))
                    places.append(place)
        if is_intervals and selected:
            streams.append(in_order(words, lambda i, places=places: reader.where(places[i]), duration))  # type: ignore[misc]
    if not streams:
        raise UserError(f"{path}: no interval tier {tier!r}; the file has {[name[:40] for name in names[:20]]}")
    return merged(streams)


class _Reader:
    """Tokens of the text in sequence. Each method raises UserError if the next token is of another kind."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text
        self.place = 0
        self._tokens = self._read()

    def _read(self) -> Iterator[tuple[str, str]]:
        for match in _TOKEN.finditer(self.text):
            self.place = match.start()
            if match.lastgroup not in ("comment", "remark"):
                yield str(match.lastgroup), str(match[str(match.lastgroup)])
        self.place = len(self.text)
        yield "end", ""

    def where(self, place: int) -> str:
        return f"{self.path}:{self.text.count(chr(10), 0, place) + 1}"

    def _next(self, expected: str) -> str:
        kind, text = next(self._tokens, ("end", ""))
        if kind != expected:
            found = {"end": "the end of the file: truncated?", "open": "an unclosed quote"}.get(kind, text)
            raise UserError(f"{self.where(self.place)}: expected a {expected}, found {found[:60]}")
        return text

    def string(self) -> str:
        return self._next("string")[1:-1].replace('""', '"')

    def flag(self) -> str:
        return self._next("flag")

    def number(self) -> float:
        return float(self._next("number"))

    def count(self) -> int:
        number = self.number()
        if not 0 <= number < 2**53 or number != int(number):
            raise UserError(f"{self.where(self.place)}: {number} is not a number of tiers or intervals")
        return int(number)


def _decode(path: Path) -> str:
    content = read_bytes(path)
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {error.encoding} ({error}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
