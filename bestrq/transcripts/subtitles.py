"""Subtitles from timed words: cues of a few lines, split between words and at pauses; SRT and WebVTT."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jsonargparse.typing import PositiveFloat, PositiveInt

from bestrq.transcripts.words import TimedWord, disjoint
from common.errors import UserError


@dataclass(frozen=True)
class SubtitleSettings:
    """Limits of subtitle cues. Words are never split: a word longer than a line gets its own line."""

    line_characters: PositiveInt = 42
    """maximum characters per line"""
    lines: PositiveInt = 2
    """maximum lines per cue"""
    longest_seconds: PositiveFloat = 6.0
    """maximum length of a cue, from the start of its first word to the end of its last word"""
    shortest_seconds: float = 1.0
    """minimum time that a cue is shown, unless the next one starts earlier; at most longest_seconds"""
    pause_seconds: PositiveFloat = 1.0
    """a pause of this length between two words starts a new cue"""

    def __post_init__(self) -> None:
        if not 0 <= self.shortest_seconds <= self.longest_seconds:
            raise UserError(
                f"subtitles.shortest_seconds is {self.shortest_seconds}: give 0 or more, and at most longest_seconds, "
                f"which is {self.longest_seconds}"
            )


@dataclass(frozen=True)
class Cue:
    """Lines shown together. Times in milliseconds; a cue ends no later than the next one starts."""

    start: int
    end: int
    lines: tuple[str, ...]


def make_cues(words: Sequence[TimedWord], settings: SubtitleSettings) -> list[Cue]:
    """Group words, sorted by start, into cues. Overlapping words are separated (`disjoint`), so cues never overlap.

    Greedy: a word joins the previous cue if the cue then stays within the settings.
    """
    longest, pause = round(1000 * settings.longest_seconds), round(1000 * settings.pause_seconds)
    cues: list[Cue] = []
    for (start, end), word in zip(disjoint(words), words, strict=True):
        last = cues[-1] if cues else None
        if last is not None and start - last.end < pause and end - last.start <= longest:
            lines = _with_word(last.lines, word.word, settings)
            if lines is not None:
                cues[-1] = Cue(last.start, end, lines)
                continue
        cues.append(Cue(start, end, (word.word,)))
    shortest = round(1000 * settings.shortest_seconds)
    shown: list[Cue] = []
    for cue in reversed(cues):
        end = max(cue.end, cue.start + shortest)
        shown.append(Cue(cue.start, min(end, shown[-1].start) if shown else end, cue.lines))
    return shown[::-1]


def _with_word(lines: tuple[str, ...], word: str, settings: SubtitleSettings) -> tuple[str, ...] | None:
    """Lines with one more word; None if it does not fit."""
    if len(lines[-1]) + 1 + len(word) <= settings.line_characters:
        return (*lines[:-1], f"{lines[-1]} {word}")
    return (*lines, word) if len(lines) < settings.lines else None


def srt_text(cues: Iterable[Cue]) -> str:
    """SubRip: numbered cues with times as `00:01:02,345 --> 00:01:04,000`."""
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n" + "\n".join(cue.lines) + "\n\n"
        for number, cue in enumerate(cues, 1)
    )


def vtt_text(cues: Iterable[Cue]) -> str:
    """WebVTT, with the characters of tags and entities escaped. Source: w3.org/TR/webvtt1, section 4.1."""
    blocks = [
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n" + "\n".join(map(_escaped, cue.lines)) + "\n"
        for cue in cues
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _escaped(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(milliseconds: int, separator: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{separator}{rest:03}"
