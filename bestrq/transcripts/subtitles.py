"""Subtitles from timed words: cues of a few lines, cut between words and at pauses; SRT and WebVTT."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bestrq.transcripts.words import TimedWord, disjoint
from common.errors import UserError


@dataclass(frozen=True)
class SubtitleSettings:
    """Where subtitles are cut. A word is never cut: a longer one has a line to itself."""

    line_characters: int = 42
    """characters of a line"""
    lines: int = 2
    """lines of a cue"""
    longest_seconds: float = 6.0
    """of a cue, from its first word's start to its last word's end"""
    shortest_seconds: float = 1.0
    """a cue stays for this long, unless the next one begins before"""
    pause_seconds: float = 1.0
    """a pause of this length between two words begins a new cue"""

    def __post_init__(self) -> None:
        for name in ("line_characters", "lines"):
            if getattr(self, name) < 1:
                raise UserError(f"subtitles.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("longest_seconds", "pause_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"subtitles.{name} is {getattr(self, name)}: give more than 0 seconds")
        if not 0 <= self.shortest_seconds <= self.longest_seconds:
            raise UserError(
                f"subtitles.shortest_seconds is {self.shortest_seconds}: give 0 or more, and at most longest_seconds, "
                f"which is {self.longest_seconds}"
            )


@dataclass(frozen=True)
class Cue:
    """What is shown at once. Times in milliseconds; a cue ends at the latest when the next begins."""

    start: int
    end: int
    lines: tuple[str, ...]


def make_cues(words: Sequence[TimedWord], settings: SubtitleSettings) -> list[Cue]:
    """The words, sorted by start, as cues. Overlapping words are parted (`disjoint`), so cues never overlap.

    A word goes into the cue before it as long as that keeps within the settings: lines are filled one after another.
    """
    longest, pause = round(1000 * settings.longest_seconds), round(1000 * settings.pause_seconds)
    cues: list[Cue] = []
    for (start, end), one in zip(disjoint(words), words, strict=True):
        last = cues[-1] if cues else None
        if last is not None and start - last.end < pause and end - last.start <= longest:
            lines = _with_word(last.lines, one.word, settings)
            if lines is not None:
                cues[-1] = Cue(last.start, end, lines)
                continue
        cues.append(Cue(start, end, (one.word,)))
    shortest = round(1000 * settings.shortest_seconds)
    held: list[Cue] = []
    for cue in reversed(cues):
        end = max(cue.end, cue.start + shortest)
        held.append(Cue(cue.start, min(end, held[-1].start) if held else end, cue.lines))
    return held[::-1]


def _with_word(lines: tuple[str, ...], word: str, settings: SubtitleSettings) -> tuple[str, ...] | None:
    """The lines with one more word, None where it does not fit."""
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
    """WebVTT. Marks that would begin a tag or an entity are escaped. Source: w3.org/TR/webvtt1, section 4.1."""
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
