"""Random sentences from a small grammar per language, with invented words that can only be spelled from the audio.

The word lists are in `words/LANGUAGE.txt`. All draws use only the method `random()` of the caller's `random.Random`,
whose stream Python guarantees not to change.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from data.corpora.numbers import spell_number

Language = Literal["en", "de", "fr", "es", "it", "nl", "cs"]
LANGUAGES: tuple[str, ...] = get_args(Language)

_LISTS = ("noun", "object", "plural", "verb", "adjective", "adverb", "place", "name")
_TOPIC_SIZE = 8
_TOPIC_SHARE = 0.6


def pick(rng: random.Random, items: Sequence[str]) -> str:
    """Draw an item, all with the same probability."""
    return items[int(rng.random() * len(items))]


@dataclass(frozen=True)
class Topic:
    """Topic of a passage of a recording: a few entries of each list, which recur in it."""

    entries: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grammar:
    """Word lists of a language: section name -> entries (one or more words each)."""

    language: str
    lists: dict[str, list[str]]

    def pseudo_word(self, rng: random.Random) -> str:
        """Draw an invented word of two or three syllables of the language."""
        parts = []
        for _ in range(2 if rng.random() < 0.6 else 3):
            parts += [pick(rng, self.lists["onset"]), pick(rng, self.lists["nucleus"])]
        return "".join(parts) + pick(rng, self.lists["coda"])

    def topic(self, rng: random.Random) -> Topic:
        """Draw a topic: a few entries of every list, and a few invented words."""
        names = [name for name in _LISTS if name in self.lists]
        entries = {name: [pick(rng, self.lists[name]) for _ in range(_TOPIC_SIZE)] for name in names}
        entries["pseudo"] = [self.pseudo_word(rng) for _ in range(_TOPIC_SIZE)]
        return Topic(entries)

    def sentence(self, rng: random.Random, topic: Topic | None = None) -> list[str]:
        """Draw the words of a sentence, 3 to about 20, in lower case and without punctuation."""
        template = pick(rng, self.lists["template"])
        filled = re.sub(r"\{(\w+)\}", lambda match: self._fill(match.group(1), rng, topic), template)
        return filled.split()

    def _fill(self, name: str, rng: random.Random, topic: Topic | None) -> str:
        if name == "number":
            limit = 100 if rng.random() < 0.6 else 1000
            return spell_number(5 + int(rng.random() * (limit - 5)), self.language)
        if name == "digits":
            count = 4 + int(rng.random() * 4)
            return " ".join(spell_number(int(rng.random() * 10), self.language) for _ in range(count))
        if topic is not None and rng.random() < _TOPIC_SHARE:
            return pick(rng, topic.entries[name])
        return self.pseudo_word(rng) if name == "pseudo" else pick(rng, self.lists[name])


@cache
def load_grammar(language: str) -> Grammar:
    """Grammar of `words/LANGUAGE.txt`, read once per process."""
    text = (Path(__file__).parent / "words" / f"{language}.txt").read_text(encoding="utf-8")
    lists: dict[str, list[str]] = {}
    body = " ".join(line.strip() for line in text.splitlines() if not line.startswith("#"))
    for name, entries in re.findall(r"(\w+): (.*?)(?= \w+: |$)", body):
        separator = "|" if name == "template" else ","
        lists[name] = [entry.strip() for entry in entries.split(separator) if entry.strip()]
    return Grammar(language, lists)
