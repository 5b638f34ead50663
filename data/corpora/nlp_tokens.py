"""Transcripts of Rev's corpora: `.nlp` token tables, their force-aligned form, and `.norm.json` spoken forms.

A table has one token per line, with columns separated by `|`. Tokens with a different spoken form have a tag
(`['15:YEAR']`); the normalisation file gives their spoken forms with probabilities. The aligned table has the spoken
words with times; the tables are matched to give times to the written words.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from common.errors import UserError
from data.corpora.text_files import numbered_lines
from data.names import name_fault
from data.transcripts import Word
from data.word_times.base import probability, read_json, seconds

_COLUMNS = ("token", "ts", "endTs", "punctuation", "prepunctuation", "tags")
_TAGS = re.compile(r"\[('(\d+):[^',\]]*'(, *'\d+:[^',\]]*')*)?\]")
# Comments of the aligner on words with a known time: the token was replaced by its spoken form, word by word.
_HARMLESS = frozenset(("", "direct"))
# Maximum length in units of a difference between two transcripts of a call, between two anchors.
_LONGEST_DIFFERENCE = 40
# Length of an anchor: a run of units that occurs once in both transcripts.
_ANCHOR = 5

_Time = tuple[float, float, float]  # start, end, confidence


@dataclass(frozen=True)
class NlpToken:
    """Line of a token table."""

    token: str
    prepunctuation: str
    punctuation: str
    tag: str
    """Number of its normalisation, or ""."""
    start: float | None = None
    end: float | None = None
    guessed: bool = False
    """True if the aligner did not find the word: its time is a guess."""

    @property
    def event(self) -> bool:
        """True for <inaudible>, <crosstalk>, <unk> and the like, which are not words."""
        return self.token.startswith("<") and self.token.endswith(">")


def read_nlp(path: Path) -> list[NlpToken]:
    """Read a table of tokens, aligned or not. Raises UserError naming file and line."""
    lines = numbered_lines(path)
    where, header = next(lines, (f"{path}:1", ""))
    columns = header.split("|")
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r} in {header[:80]!r}; is this a table of tokens?")
    return [_token(dict(zip(columns, _fields(line, len(columns), where), strict=True)), where) for where, line in lines]


def _fields(line: str, count: int, where: str) -> list[str]:
    fields = line.split("|")
    if len(fields) != count:
        raise UserError(f"{where}: {len(fields)} fields, the first line has {count}: {line[:80]!r}")
    if name_fault(line.replace("\t", " ")):
        raise UserError(f"{where}: a control character; the file is damaged: download it again")
    return fields


def _token(fields: Mapping[str, str], where: str) -> NlpToken:
    token = fields["token"].strip()
    if not token:
        raise UserError(f"{where}: an empty token")
    tags = _TAGS.fullmatch(fields["tags"].strip())
    if tags is None:
        raise UserError(f"{where}: tags are {fields['tags'][:60]!r}, expected ['NUMBER:CLASS'] or []")
    # A word that the aligner deleted has no time.
    start, end = (seconds(fields[name], where) if fields[name].strip() else None for name in ("ts", "endTs"))
    for name, value in (("ts", start), ("endTs", end)):
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{where}: {name} is {value}, expected seconds, 0 or more")
    guessed = not _HARMLESS.issuperset(part.strip() for part in fields.get("ali_comment", "").split(","))
    return NlpToken(token, fields["prepunctuation"], fields["punctuation"], tags.group(2) or "", start, end, guessed)


def read_normalizations(path: Path) -> dict[str, list[str]]:
    """Read the most probable spoken form of every tag: number -> words, which may be empty.

    The first of equally probable forms is used. Raises UserError naming the file and the tag.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object of normalisations by number")
    best = {}
    for tag, entry in content.items():
        where = f"{path}: normalisation {tag[:20]!r}"
        candidates = entry.get("candidates") if isinstance(entry, dict) else None
        if not isinstance(candidates, list) or not candidates:
            raise UserError(f"{where}: no list of candidates")
        forms = [_candidate(candidate, f"{where}, candidate {n}") for n, candidate in enumerate(candidates)]
        best[tag] = max(forms, key=lambda form: form[0])[1]
    return best


def _candidate(candidate: object, where: str) -> tuple[float, list[str]]:
    fields = candidate if isinstance(candidate, dict) else {}
    words, score = fields.get("verbalization"), probability(fields.get("probability"), where)
    if score is None or not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise UserError(f"{where}: expected a probability and a verbalization of words")
    if any(name_fault(word) for word in words):
        raise UserError(f"{where}: a control character in {words}")
    return score, [word.strip() for word in words]


def transcript_units(
    tokens: Sequence[NlpToken], spoken: Mapping[str, Sequence[str]] | None, punctuation: bool
) -> Iterator[tuple[str, list[str]]]:
    """Split the transcript into units: adjacent tokens with the same tag, or a single token.

    Args:
        spoken: spoken forms by tag (`read_normalizations`); None: the words as written.
        punctuation: keep punctuation marks, attached to the words.
    Yields:
        (key that identifies the unit in another table of the same call, its words; none for an event).
    """
    for tag, group in groupby(enumerate(tokens), key=lambda pair: pair[1].tag or -pair[0] - 1):
        unit = [token for _, token in group]
        key = tag if isinstance(tag, str) else unit[0].token.strip("<>").lower()
        spoken_words = spoken.get(str(tag)) if spoken is not None else None
        if spoken_words is None:
            yield key, [_marked([t.token], t, t, punctuation)[0] for t in unit if not t.event]
        else:
            yield key, _marked(list(spoken_words), unit[0], unit[-1], punctuation)


def _marked(words: list[str], first: NlpToken, last: NlpToken, punctuation: bool) -> list[str]:
    """Words with the punctuation before the first token and after the last one."""
    if punctuation and words:
        words[0] = first.prepunctuation.strip() + words[0]
        words[-1] += last.punctuation.strip()
    return words


def timed_words(units: Sequence[tuple[str, list[str]]], aligned: Sequence[NlpToken], name: str) -> list[Word]:
    """Words of the units with their times from the aligned table, sorted by start.

    The confidence is 1 if the aligner found the word, and 0 if the time is a guess, made by the aligner or by
    distributing words without a time evenly over the gap between their neighbours.

    Raises UserError naming the file if the alignment has less than half of the units.
    """
    aligned_units: list[list[NlpToken]] = []
    keys = []
    for tag, group in groupby(enumerate(aligned), key=lambda pair: pair[1].tag or -pair[0] - 1):
        aligned_units.append([token for _, token in group])
        keys.append(tag if isinstance(tag, str) else aligned_units[-1][0].token.strip("<>").lower())
    matches = _match([key for key, _ in units], keys)
    shared = sum(match is not None for match in matches)
    if 2 * shared < len(units):
        raise UserError(
            f"{name}: has {shared} of the {len(units)} tokens of the transcript; truncated, or of another call"
        )
    words: list[str] = []
    times: list[_Time | None] = []
    for (_, unit_words), match in zip(units, matches, strict=True):
        words += unit_words
        times += _distributed(len(unit_words), [] if match is None else aligned_units[match])
    filled = _filled(_in_order(times))
    return [Word(word, *time) for word, time in zip(words, filled, strict=True)]


def _match(a: Sequence[str], b: Sequence[str]) -> list[int | None]:
    """Index in b of every key of a, or None.

    Keys are matched between anchors, so that a section missing from a or b, of any length, does not affect the rest.
    """
    places: list[int | None] = [None] * len(a)
    i = j = 0
    for next_i, next_j in [*_anchors(a, b), (len(a), len(b))]:
        _walk(a[i:next_i], b[j:next_j], i, j, places)
        i, j = next_i, next_j
    return places


def _anchors(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Indices in a and b of the runs of _ANCHOR keys that occur once in each, increasing in both."""
    first, second = _single_runs(a), _single_runs(b)
    pairs = [(i, second[run]) for run, i in first.items() if run in second]  # in the order of a
    kept = _longest_rising([j for _, j in pairs])
    return [pair for number, pair in enumerate(pairs) if number in kept]


def _single_runs(keys: Sequence[str]) -> dict[tuple[str, ...], int]:
    """Indices of the runs of _ANCHOR keys that occur once."""
    runs = [tuple(keys[n : n + _ANCHOR]) for n in range(len(keys) - _ANCHOR + 1)]
    counts = Counter(runs)
    return {run: n for n, run in enumerate(runs) if counts[run] == 1}


def _walk(a: Sequence[str], b: Sequence[str], first_a: int, first_b: int, places: list[int | None]) -> None:
    """Set the indices of a's keys in b, with offsets `first_a` and `first_b`.

    Both are traversed in parallel; after a difference, matching continues at the nearest two equal keys.
    """
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            places[first_a + i] = first_b + j
            i, j = i + 1, j + 1
            continue
        skips = ((n, d - n) for d in range(1, _LONGEST_DIFFERENCE) for n in range(d + 1))
        m, n = next(((m, n) for m, n in skips if a[i + m : i + m + 2] == b[j + n : j + n + 2]), (1, 1))
        i, j = i + m, j + n


def _distributed(count: int, tokens: Sequence[NlpToken]) -> list[_Time | None]:
    """Times of `count` words from their aligned tokens, whose number may differ."""
    known = [
        (t.start, t.end, 0.0 if t.guessed else 1.0) if t.start is not None and t.end is not None else None
        for t in tokens
    ]
    known = [time if time and time[0] <= time[1] else None for time in known]
    if count == len(known):
        return list(known)
    timed = [time for time in known if time]
    if not timed:
        return [None] * count
    start, end = timed[0][0], max(timed[0][0], timed[-1][1])
    if count == 1:
        return [(start, end, min(time[2] for time in timed) if len(timed) == len(known) else 0.0)]
    step = (end - start) / max(count, 1)
    return [(start + n * step, start + (n + 1) * step, 0.0) for n in range(count)]


def _in_order(times: Sequence[_Time | None]) -> list[_Time | None]:
    """Remove times that are out of order: a longest non-decreasing subsequence of starts is kept."""
    kept = _longest_rising([None if time is None else time[0] for time in times])
    return [time if n in kept else None for n, time in enumerate(times)]


def _longest_rising(values: Sequence[float | None]) -> set[int]:
    """Indices of a longest non-decreasing subsequence of the values."""
    ends: list[float] = []  # smallest last value of a subsequence of each length
    tops: list[int] = []  # index of that value
    before: dict[int, int] = {}  # index -> predecessor in the longest subsequence that ends there
    for number, value in enumerate(values):
        if value is not None:
            length = bisect_right(ends, value)
            before[number] = tops[length - 1] if length else -1
            ends[length : length + 1], tops[length : length + 1] = [value], [number]
    kept = set()
    number = tops[-1] if tops else -1
    while number >= 0:
        kept.add(number)
        number = before[number]
    return kept


def _filled(times: Sequence[_Time | None]) -> list[_Time]:
    """Distribute words without a time evenly over the gap between their neighbours."""
    filled: list[_Time] = []
    number = 0
    while number < len(times):
        time = times[number]
        if time is not None:
            filled.append(time)
            number += 1
            continue
        after = next((n for n in range(number, len(times)) if times[n] is not None), len(times))
        left = filled[-1][1] if filled else 0.0
        right = times[after][0] if after < len(times) else left  # type: ignore[index]
        left = min(left, right)
        step = (right - left) / (after - number)
        filled += [(left + n * step, left + (n + 1) * step, 0.0) for n in range(after - number)]
        number = after
    return filled
