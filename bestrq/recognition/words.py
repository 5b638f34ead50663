"""Words and their times, from the tokens of a search and the frames that they came from."""

from collections.abc import Sequence
from dataclasses import dataclass

from bestrq.recognition.decoding import TimedTokens

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
    inside = False
    for token, first, last in zip(tokens.ids, tokens.first_frame, tokens.last_frame, strict=True):
        end = (last + 1) * seconds_per_frame
        for place, part in enumerate(pieces[token].split(MARK)):
            inside = inside and place == 0  # there is a mark before every part but the first
            if part and inside:
                words[-1] = TimedWord(words[-1].word + part, words[-1].start, end)
            elif part:
                words.append(TimedWord(part, first * seconds_per_frame, end))
                inside = True
    return words
