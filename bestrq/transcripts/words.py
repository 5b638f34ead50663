"""Words with times, from the tokens of a search and their frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bestrq.decoding.tokens import TimedTokens

MARK = "\u2581"
"""space in the text of a token, SentencePiece's marker"""


@dataclass(frozen=True)
class TimedWord:
    """Word with its times."""

    word: str
    start: float
    """seconds"""
    end: float
    """seconds"""
    confidence: float | None = None
    """mean over its tokens, 0 to 1; None if unknown"""


def timed_words(tokens: TimedTokens, pieces: Sequence[str], seconds_per_frame: float) -> list[TimedWord]:
    """Group the tokens of a sequence into words; joined by spaces, the words are its text.

    A word lasts from the start of its first token's first frame to the end of its last token's last frame. A token
    that consists of spaces belongs to no word. CTC tokens span several frames; a transducer token has the frame that
    emitted it, so a word of a single token lasts one frame.

    Args:
        pieces: text of each token id.
        seconds_per_frame: duration of an encoder frame.
    """
    words: list[TimedWord] = []
    word_confidences: list[list[float]] = []  # of the tokens of each word
    in_word = False
    confidences: Sequence[float | None] = tokens.confidence or [None] * len(tokens.ids)
    for token, first, last, confidence in zip(
        tokens.ids, tokens.first_frame, tokens.last_frame, confidences, strict=True
    ):
        end = (last + 1) * seconds_per_frame
        for place, part in enumerate(pieces[token].split(MARK)):
            in_word = in_word and place == 0  # a space precedes every part except the first
            if part and in_word:
                words[-1] = TimedWord(words[-1].word + part, words[-1].start, end)
            elif part:
                words.append(TimedWord(part, first * seconds_per_frame, end))
                word_confidences.append([])
                in_word = True
            if part and confidence is not None:
                word_confidences[-1].append(confidence)
    means = [sum(values) / len(values) if values else None for values in word_confidences]
    return [replace(word, confidence=mean) for word, mean in zip(words, means, strict=True)]


def disjoint(words: Sequence[TimedWord], duration: int | None = None) -> list[tuple[int, int]]:
    """Start and end of each word in whole milliseconds; no word is empty and none overlaps the next.

    Words of a transducer may start in the same frame; each then starts at least 1 ms after the previous one. A word
    that overlaps the next one ends at its start.

    Args:
        words: sorted by start.
        duration: milliseconds of the recording, at least one per word; bounds the times.
    """
    starts: list[int] = []
    for word in words:
        starts.append(max(round(1000 * word.start), starts[-1] + 1 if starts else 0))
    limit = duration
    if limit is not None:  # move starts beyond the end of the recording back, from the last word on
        for place in range(len(starts) - 1, -1, -1):
            starts[place] = limit = min(starts[place], limit - 1)
    times: list[tuple[int, int]] = []
    for place, (start, word) in enumerate(zip(starts, words, strict=True)):
        following = starts[place + 1] if place + 1 < len(starts) else duration
        end = max(round(1000 * word.end), start + 1)
        times.append((start, end if following is None else min(end, following)))
    return times
