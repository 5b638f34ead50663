"""File formats of transcripts: plain text, JSON, CTM and TextGrid; SRT and VTT are in `subtitles`.

Times are rounded to milliseconds. JSON and CTM keep overlapping and empty words, which a transducer may produce.
TextGrid and subtitles do not allow them; there, `disjoint` separates the words.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bestrq.transcripts.subtitles import SubtitleSettings, make_cues, srt_text, vtt_text
from bestrq.transcripts.words import TimedWord, disjoint

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TimedTranscript:
    """Transcript of a recording with word times."""

    id: str
    """name of the recording"""
    seconds: float
    """duration of the recording"""
    text: str
    words: Sequence[TimedWord]
    """sorted by start; words contain no white space"""


def plain_text(transcript: TimedTranscript) -> str:
    """Text with a final newline."""
    return transcript.text + "\n"


def json_text(transcript: TimedTranscript) -> str:
    """JSON object of `id`, `seconds`, `text` and `words`; a word is `{"word", "start", "end", "confidence"}`."""
    words = [
        {"word": word.word, "start": round(word.start, 3), "end": round(word.end, 3), "confidence": _confidence(word)}
        for word in transcript.words
    ]
    content = {
        "format_version": FORMAT_VERSION, "id": transcript.id, "seconds": round(transcript.seconds, 3),
        "text": transcript.text, "words": words,
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def ctm_text(transcript: TimedTranscript) -> str:
    """NIST's time-marked words: file, channel, start, duration, word, and confidence if known.

    ASCII white space separates fields, so it is replaced by "_" in the recording's name; other spaces, such as U+3000,
    are kept. Source: SCTK, doc/infmts.htm.
    """
    name = re.sub(r"[ \t\n\r\f\v]+", "_", transcript.id)
    lines = []
    for word in transcript.words:
        start, end = round(1000 * word.start), round(1000 * word.end)
        fields = [name, "1", f"{start / 1000:.3f}", f"{(end - start) / 1000:.3f}", word.word]
        confidence = _confidence(word)
        lines.append(" ".join([*fields, *([] if confidence is None else [f"{confidence:.3f}"])]) + "\n")
    return "".join(lines)


def textgrid_text(transcript: TimedTranscript) -> str:
    """Praat's long text format with one interval tier, "words". Empty intervals fill the gaps between words.

    Source: Praat's manual, "TextGrid file formats".
    """
    words = transcript.words
    # A tier needs a positive length, and at least 1 ms for each word.
    last = max(round(1000 * transcript.seconds), len(words), 1)
    intervals: list[tuple[int, int, str]] = []
    place = 0
    for (start, end), word in zip(disjoint(words, last), words, strict=True):
        if start > place:
            intervals.append((place, start, ""))
        intervals.append((start, end, word.word))
        place = end
    if place < last:
        intervals.append((place, last, ""))
    end_time = f"xmax = {last / 1000:.3f}"
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "",
        "xmin = 0", end_time, "tiers? <exists>", "size = 1", "item []:",
        "    item [1]:",
        '        class = "IntervalTier"', '        name = "words"',
        "        xmin = 0", f"        {end_time}", f"        intervals: size = {len(intervals)}",
    ]  # fmt: skip
    for number, (start, end, text) in enumerate(intervals, 1):
        quoted = text.replace('"', '""')
        lines += [
            f"        intervals [{number}]:",
            f"            xmin = {start / 1000:.3f}",
            f"            xmax = {end / 1000:.3f}",
            f'            text = "{quoted}"',
        ]
    return "\n".join(lines) + "\n"


def _confidence(word: TimedWord) -> float | None:
    return None if word.confidence is None else round(word.confidence, 3)


WRITERS: dict[str, Callable[[TimedTranscript, SubtitleSettings], str]] = {
    "txt": lambda transcript, _: plain_text(transcript),
    "json": lambda transcript, _: json_text(transcript),
    "ctm": lambda transcript, _: ctm_text(transcript),
    "TextGrid": lambda transcript, _: textgrid_text(transcript),
    "srt": lambda transcript, settings: srt_text(make_cues(transcript.words, settings)),
    "vtt": lambda transcript, settings: vtt_text(make_cues(transcript.words, settings)),
}
"""content of a file, to be encoded as UTF-8, by name of the format, which is also the file suffix"""
