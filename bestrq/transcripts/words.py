"""Words and their times, from the tokens of a search and the frames that they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bestrq.decoding.tokens import TimedTokens

MARK = "\u2581"
"""how a token is written that has a space before, or is one"""


@dataclass(frozen=True)
class TimedWord:
    """A word and when it was said."""

    word: str
    start: float
    """seconds"""
    end: float
    """seconds"""
    confidence: float | None = None
    """mean of that of its tokens, 0 to 1; None where it is not known"""


def timed_words(tokens: TimedTokens, pieces: Sequence[str], seconds_per_frame: float) -> list[TimedWord]:
    """The words of a sequence; joined by spaces, they are its text.

    A word lasts from the begin of its first token's first frame to the end of its last token's last frame. A token
    that is nothing but a space belongs to no word. CTC's tokens have several frames, those of a transducer one, in
    which they were emitted: a word of a single token then lasts a frame.

    Args:
        pieces: how the token of every id is written.
        seconds_per_frame: length of an encoder frame.
    """
    words: list[TimedWord] = []
    of_tokens: list[list[float]] = []  # confidences, by word
    inside = False
    confidences: Sequence[float | None] = tokens.confidence or [None] * len(tokens.ids)
    for token, first, last, confidence in zip(
        tokens.ids, tokens.first_frame, tokens.last_frame, confidences, strict=True
    ):
        end = (last + 1) * seconds_per_frame
        for place, part in enumerate(pieces[token].split(MARK)):
            inside = inside and place == 0  # there is a mark before every part but the first
            if part and inside:
                words[-1] = TimedWord(words[-1].word + part, words[-1].start, end)
            elif part:
                words.append(TimedWord(part, first * seconds_per_frame, end))
                of_tokens.append([])
                inside = True
            if part and confidence is not None:
                of_tokens[-1].append(confidence)
    means = [sum(some) / len(some) if some else None for some in of_tokens]
    return [replace(word, confidence=mean) for word, mean in zip(words, means, strict=True)]


def disjoint(words: Sequence[TimedWord], duration: int | None = None) -> list[tuple[int, int]]:
    """Start and end of every word in whole milliseconds, so that none is empty and none overlaps the next.

    Words of a transducer may begin in the same frame, and then have to share it: each begins at least 1 ms after the
    one before it. A word that lasts into the next one ends where that begins.

    Args:
        words: sorted by start.
        duration: milliseconds of the recording, at least one for every word: nothing ends after it.
    """
    starts: list[int] = []
    for word in words:
        starts.append(max(round(1000 * word.start), starts[-1] + 1 if starts else 0))
    limit = duration
    if limit is not None:  # from the end on, what has been pushed out of the recording is pushed back
        for place in range(len(starts) - 1, -1, -1):
            starts[place] = limit = min(starts[place], limit - 1)
    times: list[tuple[int, int]] = []
    for place, (start, word) in enumerate(zip(starts, words, strict=True)):
        following = starts[place + 1] if place + 1 < len(starts) else duration
        end = max(round(1000 * word.end), start + 1)
        times.append((start, end if following is None else min(end, following)))
    return times
