"""What is done to reference and hypothesis alike before they are compared, by language.

The rules are data, so that a report can list them. Names: `whisper-english` and `whisper-basic` are Whisper's
(Radford et al. 2022, appendix C); `unicode` is this project's for all other languages; `unicode+xx` is `unicode` after
the rules of the language xx below.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from bestrq.config import ConfigError

Choice = Literal["auto", "whisper-english", "whisper-basic", "unicode"]
"""auto: `whisper-english` for English, else the rules of the language and `unicode`; the others: for all languages"""


@dataclass(frozen=True)
class Rule:
    """A replacement in one language, where the same word is written in two ways."""

    pattern: str
    """regular expression, matched against composed (NFC) text; \\u escapes"""
    replacement: str
    reason: str


@dataclass(frozen=True)
class Normaliser:
    """A function of text, its name, and what it does in words."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    clean: Callable[[str], str]
    """text to text with single spaces"""
    unspaced: bool = False
    """the language is written without spaces, and those between the words here, which are characters, count for none"""

    def facts(self) -> dict[str, Any]:
        """For JSON and the report."""
        return {"description": self.description, "rules": [asdict(rule) for rule in self.rules]}


RULES: dict[str, tuple[Rule, ...]] = {
    "ar": (
        Rule("[\\u064B-\\u0652\\u0670\\u0640]", "", "vowel marks and tatweel are optional"),
        Rule("[\\u0622\\u0623\\u0625]", "\u0627", "alef is written with or without hamza and madda"),
    ),
    "de": (Rule("[\\u00DF\\u1E9E]", "ss", "sharp s is ss in Switzerland and in capitals"),),
    "fr": (
        Rule("(?i)\\u0153", "oe", "the ligature is optional"),
        Rule("(?i)\\u00E6", "ae", "the ligature is optional"),
    ),
    "he": (Rule("[\\u05B0-\\u05BC\\u05C1\\u05C2\\u05C7]", "", "vowel points are optional"),),
    "ro": (
        Rule("[\\u0163\\u0162]", "\u021b", "t with cedilla stands for t with comma in older texts"),
        Rule("[\\u015F\\u015E]", "\u0219", "s with cedilla stands for s with comma in older texts"),
    ),
    "ru": (Rule("(?i)\\u0451", "\u0435", "yo is mostly written as ye"),),
    "tr": (
        Rule("I", "\u0131", "the capital of dotless i, which lower case would give a dot"),
        Rule("\\u0130", "i", "the capital of dotted i"),
    ),
    "uk": (Rule("(?<=\\w)['\\u2019\\u02BC`](?=\\w)", "\u02bc", "the apostrophe is part of a word, in several forms"),),
}
RULES |= {"az": RULES["tr"], "be": RULES["uk"]}
# Written without spaces: every character counts as a word, as in Whisper's evaluation.
_UNSPACED = frozenset(("zh", "yue", "cmn", "ja", "th", "lo", "km", "my", "bo"))
_CODES = {"english": "en", "eng": "en", "deu": "de", "ger": "de", "fra": "fr", "fre": "fr", "ron": "ro", "rum": "ro",
          "rus": "ru", "tur": "tr", "ukr": "uk", "ara": "ar", "heb": "he", "german": "de", "french": "fr",
          "romanian": "ro", "russian": "ru", "turkish": "tr", "ukrainian": "uk", "arabic": "ar", "hebrew": "he",
          "zho": "zh", "chi": "zh", "chinese": "zh", "jpn": "ja", "japanese": "ja", "tha": "th", "thai": "th",
          "aze": "az", "bel": "be"}  # fmt: skip
_UNICODE = (
    "lower case, NFKC, texts in brackets left out, symbols and punctuation turned into spaces, combining marks kept"
)


@cache
def normaliser(language: str, choice: Choice = "auto") -> Normaliser:
    """The normaliser of a language: "en", "en-GB", "eng", "English"; any case. A language without rules of its own, or
    one that is not known (""), gets `unicode`; the name of the result says so.

    Raises ConfigError for a choice that there is not.
    """
    code = language.lower().replace("_", "-").split("-")[0]
    code = _CODES.get(code, code)
    if choice == "whisper-english" or (choice == "auto" and code == "en"):
        described = "Whisper's for English: numbers, contractions, fillers, British spelling"
        return Normaliser("whisper-english", described, (), _spaced(EnglishTextNormalizer()))
    if choice == "whisper-basic":
        described = "Whisper's for all languages: as `unicode`, but combining marks are turned into spaces too"
        return Normaliser("whisper-basic", described, (), _spaced(BasicTextNormalizer()))
    if choice == "unicode" or (choice == "auto" and code not in RULES and code not in _UNSPACED):
        return Normaliser("unicode", _UNICODE, (), _spaced(BasicTextNormalizer(preserve_marks=True)))
    if choice != "auto":
        raise ConfigError(f"normaliser = {choice!r}: give auto, whisper-english, whisper-basic or unicode")
    rules = RULES.get(code, ())
    unspaced = code in _UNSPACED
    described = f"{_UNICODE}; every character counts as a word" if unspaced else f"{_UNICODE}; first the rules"
    basic = BasicTextNormalizer(preserve_marks=True, split_letters=unspaced)
    return Normaliser(f"unicode+{code}", described, rules, _spaced(_with_rules(rules, basic)), unspaced)


def normalisers_used(names_and_languages: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What a report says of the normalisers of a corpus.

    Args:
        names_and_languages: name of the normaliser and language of every recording.

    Returns:
        By name: description, rules, languages; and a note where a language has no rules of its own.
    """
    languages: dict[str, set[str]] = {}
    for name, language in names_and_languages:
        languages.setdefault(name, set()).add(language)
    used = {}
    for name in sorted(languages):
        mine = sorted(languages[name])
        choice: Any = "auto" if "+" in name else name
        used[name] = {**normaliser(mine[0], choice).facts(), "languages": mine}
        if name == "unicode":
            known = ", ".join(language or "not given" for language in mine)
            used[name]["note"] = f"no rules of their own, so the general ones: {known}"
    return used


def _spaced(clean: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(clean(text).split())


def _with_rules(rules: tuple[Rule, ...], clean: Callable[[str], str]) -> Callable[[str], str]:
    compiled = [(re.compile(rule.pattern), rule.replacement) for rule in rules]

    def normalise(text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return clean(text)

    return normalise
