"""NIST STM: segments of recordings with times and text, as in TED-LIUM.

A line is `RECORDING CHANNEL SPEAKER START END [<LABEL>] TEXT`, times in seconds; lines that start with `;;` are
comments. Fields are separated by spaces and tabs. Any field in angle brackets after the times is the label, as in
NIST's sclite (SCTK, src/sclite/stm.c). An STM gives the times of segments, not of words. A segment that is not scored
has the text `ignore_time_segment_in_scoring` in upper or lower case, or the speaker `inter_segment_gap`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from data.names import name_fault, space_fields
from data.word_times.base import read_bytes, seconds

IGNORED_TEXT = "ignore_time_segment_in_scoring"
GAP_SPEAKER = "inter_segment_gap"
_FIELDS = 5  # before the label and the text
# `word(2)`: the second pronunciation of the word.
_PRONUNCIATION = re.compile(r"\(\d+\)$")
# `<o,f0,male>`, `<>`, `<NA>`, `<o, f0, male>`; with other spaces it is text, such as `<5 or >6`.
_LABEL = re.compile(r"<[ \t]*([^<> \t,]*(?:,[ \t]*[^<> \t,]*)*)[ \t]*>")
_EVENT = re.compile(r"<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]")
# Endings that TED-LIUM writes as separate words. Other words start with an apostrophe too: 'cause, 'em, 'til.
_CLITICS = frozenset(("'s", "'m", "'d", "'t", "'re", "'ve", "'ll", "'"))


@dataclass(frozen=True)
class StmSegment:
    """Line of an STM file."""

    recording: str
    channel: str
    speaker: str
    start: float
    """Seconds from the start of the recording."""
    end: float
    """Seconds, not before the start."""
    label: str
    """Text between `<` and `>` before the transcript, such as `o,f0,male`; may be empty."""
    text: str
    """Transcript as written; `plain_text` removes the marks."""

    @property
    def ignored(self) -> bool:
        """True if the segment is not scored."""
        words = _EVENT.sub(" ", self.text).strip().lower()
        return words == IGNORED_TEXT or self.speaker.lower() == GAP_SPEAKER


def read_stm(path: Path) -> list[StmSegment]:
    """Read the segments of an STM file, sorted by recording, start and end.

    Raises:
        UserError: naming the file, or file and line: not readable, too large, not UTF-8, a line with fewer than five
            fields, a time that is not a number or negative, or an end before the start.
    """
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from error
    # Not splitlines(), which also splits at characters that occur within sentences.
    lines = enumerate(text.split("\n"), 1)
    segments = [_segment(line, f"{path}:{n}") for n, line in lines if line.strip() and not line.startswith(";;")]
    return sorted(segments, key=lambda s: (s.recording, s.start, s.end))


def _segment(line: str, where: str) -> StmSegment:
    fields = space_fields(line, _FIELDS)
    if len(fields) < _FIELDS:
        raise UserError(
            f"{where}: {len(fields)} fields, expected RECORDING CHANNEL SPEAKER START END <LABEL> TEXT: {line[:80]!r}"
        )
    recording, channel, speaker, *times = fields[:_FIELDS]
    text = fields[_FIELDS].strip() if len(fields) > _FIELDS else ""
    if name_fault(line.replace("\t", " ").rstrip("\r")):
        raise UserError(f"{where}: a control character; the file is damaged: download it again")
    start, end = (seconds(value, where) for value in times)
    if not 0 <= start <= end < math.inf:  # also false for NaN
        raise UserError(
            f"{where}: from {start} to {end} s: a segment must start at 0 or later, and end after its start"
        )
    label = _LABEL.match(text)
    if label is not None:
        text = text[label.end() :].strip()
    return StmSegment(recording, channel, speaker, start, end, label[1] if label else "", text)


def plain_text(text: str) -> str:
    """Words of a TED-LIUM transcript, without events and pronunciation marks, and with clitics joined to their words.

    `<unk> and {NOISE} i 'm a(2) friend [laughs]` becomes `and i'm a friend`.
    """
    words: list[str] = []
    after_word = False
    for token in _EVENT.sub(" \0 ", text).split():
        if token == "\0":
            after_word = False  # `<unk> 's`: the word before the clitic is unknown
            continue
        token = _PRONUNCIATION.sub("", token)
        if not token:
            continue
        if token.lower() in _CLITICS and after_word:
            words[-1] += token
        else:
            words.append(token)
        after_word = True
    return " ".join(words)
