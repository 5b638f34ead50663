"""Sentences from word lists: a small grammar a language, with invented words that can only be spelled by ear.

The lists stand in `words/LANGUAGE.txt`. Every draw comes from the `random.Random` that the caller gives, through
`random()` alone, whose stream Python promises not to change.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from data.corpora.numbers import spell_number

LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "cs")

_LISTS = ("noun", "object", "plural", "verb", "adjective", "adverb", "place", "name")
_TOPIC_SIZE = 8
_TOPIC_SHARE = 0.6


def pick(rng: random.Random, items: Sequence[str]) -> str:
    """One of the items, each as likely as the others."""
    return items[int(rng.random() * len(items))]


@dataclass(frozen=True)
class Topic:
    """What one stretch of a recording is about: the few entries of each list that keep coming back."""

    entries: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grammar:
    """The lists of one language: section name -> entries (one or more words each)."""

    language: str
    lists: dict[str, list[str]]

    def pseudo_word(self, rng: random.Random) -> str:
        """A word that does not exist, of two or three of the language's syllables."""
        parts = []
        for _ in range(2 if rng.random() < 0.6 else 3):
            parts += [pick(rng, self.lists["onset"]), pick(rng, self.lists["nucleus"])]
        return "".join(parts) + pick(rng, self.lists["coda"])

    def topic(self, rng: random.Random) -> Topic:
        """A few entries of every list, and a few invented words."""
        names = [name for name in _LISTS if name in self.lists]
        entries = {name: [pick(rng, self.lists[name]) for _ in range(_TOPIC_SIZE)] for name in names}
        entries["pseudo"] = [self.pseudo_word(rng) for _ in range(_TOPIC_SIZE)]
        return Topic(entries)

    def sentence(self, rng: random.Random, topic: Topic | None = None) -> list[str]:
        """The words of one sentence, in lower case and without punctuation; 3 to about 20 of them."""
        template = pick(rng, self.lists["template"])
        filled = re.sub(r"\{(\w+)\}", lambda match: self._fill(match.group(1), rng, topic), template)
        return filled.split()

    def _fill(self, name: str, rng: random.Random, topic: Topic | None) -> str:
        if name == "number":
            most = 100 if rng.random() < 0.6 else 1000
            return spell_number(5 + int(rng.random() * (most - 5)), self.language)
        if name == "digits":
            count = 4 + int(rng.random() * 4)
            return " ".join(spell_number(int(rng.random() * 10), self.language) for _ in range(count))
        if topic is not None and rng.random() < _TOPIC_SHARE:
            return pick(rng, topic.entries[name])
        return self.pseudo_word(rng) if name == "pseudo" else pick(rng, self.lists[name])


@cache
def load_grammar(language: str) -> Grammar:
    """The grammar of `words/LANGUAGE.txt`, read once a process."""
    text = (Path(__file__).parent / "words" / f"{language}.txt").read_text(encoding="utf-8")
    lists: dict[str, list[str]] = {}
    body = " ".join(line.strip() for line in text.splitlines() if not line.startswith("#"))
    for name, entries in re.findall(r"(\w+): (.*?)(?= \w+: |$)", body):
        separator = "|" if name == "template" else ","
        lists[name] = [entry.strip() for entry in entries.split(separator) if entry.strip()]
    return Grammar(language, lists)
